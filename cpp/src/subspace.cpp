#include "csulora/subspace.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>

#include "runtime/check.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"
#include "subspace_check.h"

namespace csulora {
namespace {

using at::Tensor;

constexpr int64_t kProbes = 4;
/// Rounding to bfloat16 bends a basis by up to 2^-8; what is not orthonormal at all is off by far more.
constexpr double kProbeTolerance = 0.03;

void check_orthonormal(const Tensor& basis, const char* name) {
  if (basis.size(1) == 0) {
    return;
  }
  const auto wide = basis.to(at::kFloat);
  const auto probes =
      at::randn({basis.size(1), kProbes}, at::detail::createCPUGenerator(0), at::kFloat).to(basis.device());
  const auto error = wide.t().matmul(wide.matmul(probes)).sub_(probes).norm(2, 0).div(probes.norm(2, 0));
  const double worst = error.max().item<double>();
  check(worst <= kProbeTolerance, "the columns of ", name, " are not orthonormal (off by ", worst,
        "); the subspace is damaged or was not made by csulora");
}

}  // namespace

void validate(const Subspace& subspace) {
  const TorchGuards torch_guards;
  check_factors(subspace, "");
  const auto& [u, s, v, certificate] = subspace;
  check(u.size(0) >= s.size(0) && v.size(0) >= s.size(0), "u is ", u.sizes(), " and v ", v.sizes(),
        "; there cannot be more directions than dimensions");
  check(s.isfinite().logical_and(s > 0).all().item<bool>() && s.diff().le(0).all().item<bool>(),
        "s must be finite, positive and descending");
  check_orthonormal(u, "u");
  check_orthonormal(v, "v");
}

void validate(const std::vector<std::pair<std::string, Subspace>>& subspaces) {
  const bool on_device = std::any_of(subspaces.begin(), subspaces.end(), [](const auto& labelled) {
    const auto& u = labelled.second.u;
    return u.defined() && !u.is_cpu();
  });
  for_each(subspaces.size(), on_device, [&](size_t i) {
    const auto& [label, subspace] = subspaces[i];
    try {
      validate(subspace);
    } catch (const InputError& error) {
      throw InputError(label + ": " + error.what());
    }
  });
}

}  // namespace csulora
