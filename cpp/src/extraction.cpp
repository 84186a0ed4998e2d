#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "certificate.h"
#include "check.h"
#include "csulora/subspace.h"
#include "displacement.h"
#include "krylov.h"

namespace csulora {
namespace {

using at::Tensor;

/// Columns beyond the wanted ones make the start block miss a leading direction with negligible probability.
constexpr int64_t kOversampling = 16;
/// Below this many blocks per short side a full SVD costs no more than the Krylov method.
constexpr int64_t kExactBlocks = 8;

void check_options(const ExtractOptions& options) {
  check(options.rank >= 1, "rank is ", options.rank, "; it must be at least 1");
  check(!options.energy || (*options.energy > 0 && *options.energy <= 1), "energy must lie in (0, 1]");
  check(options.tolerance > 0 && options.tolerance < 1, "tolerance must lie in (0, 1)");
  const auto dtype = options.factor_dtype;
  check(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat,
        "factor_dtype must be float16, bfloat16 or float32");
}

double noise_edge(const Displacement& d) {
  const auto m = static_cast<double>(d.matrix.size(0));
  const auto n = static_cast<double>(d.matrix.size(1));
  return d.noise_std * (std::sqrt(m) + std::sqrt(n));
}

int64_t count_above(const Tensor& values, double threshold) { return values.gt(threshold).sum().item<int64_t>(); }

/// How many leading directions the options ask for, given all computed singular values.
int64_t wanted_count(const Tensor& values, const Displacement& d, int64_t limit, const ExtractOptions& options) {
  int64_t count = std::min(limit, values.size(0));
  if (options.energy) {
    const auto captured = values.square().cumsum(0);
    count = std::min(count, 1 + captured.lt(*options.energy * d.norm2).sum().item<int64_t>());
  }
  // A singular value of exactly zero has no direction.
  const double floor = options.keep_noise ? 0 : noise_edge(d);
  return std::min(count, count_above(values, floor));
}

SingularTriples leading_triples(const Displacement& d, int64_t limit, const ExtractOptions& options) {
  const auto wanted = [&](const Tensor& values) { return wanted_count(values, d, limit, options); };
  const int64_t short_side = std::min(d.matrix.size(0), d.matrix.size(1));
  const int64_t block = limit + kOversampling;
  if (short_side > kExactBlocks * block) {
    const KrylovOptions krylov{block, short_side / 2 / block, options.tolerance, options.seed};
    if (auto triples = block_krylov(d.matrix, wanted, krylov)) {
      return *std::move(triples);
    }
  }
  return exact_triples(d.matrix, wanted);
}

Certificate measured(const Displacement& d, const Subspace& subspace, const SingularTriples& fresh) {
  auto certificate = measure_factors(d, subspace, fresh.next_value);
  certificate.noise_edge = noise_edge(d);
  certificate.above_noise = count_above(fresh.computed, certificate.noise_edge);
  certificate.passes = fresh.passes;
  return certificate;
}

}  // namespace

Subspace extract_subspace(const Tensor& base, const Tensor& aligned, const ExtractOptions& options) {
  check_options(options);
  const c10::NoGradGuard no_grad;
  const auto d = displacement(base, aligned, options.noise_std);
  const int64_t limit = std::min({options.rank, d.matrix.size(0), d.matrix.size(1)});
  const auto triples = leading_triples(d, limit, options);
  Subspace subspace{triples.u.to(options.factor_dtype).contiguous(), triples.s.to(at::kFloat),
                    triples.v.to(options.factor_dtype).contiguous()};
  subspace.certificate = measured(d, subspace, triples);
  return subspace;
}

Certificate certify(const Tensor& base, const Tensor& aligned, const Subspace& subspace,
                    const ExtractOptions& options) {
  const auto d = displacement(base, aligned, options.noise_std);
  check_factors(d, subspace);
  const c10::NoGradGuard no_grad;
  const int64_t k = subspace.s.size(0);
  ExtractOptions fresh = options;
  fresh.rank = std::max<int64_t>(1, k);
  fresh.keep_noise = true;
  fresh.energy.reset();
  const auto triples = leading_triples(d, std::min({fresh.rank, d.matrix.size(0), d.matrix.size(1)}), fresh);
  return measured(d, subspace, triples);
}

}  // namespace csulora
