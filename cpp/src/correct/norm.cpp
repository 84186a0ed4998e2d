#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "correct/storage.h"
#include "correct/thin.h"
#include "csulora/correct.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"

namespace csulora {

double norm(const LoraFactors& factors) {
  check_matrix(factors.b, "b");
  check_matrix(factors.a, "a");
  check_same_device(factors.a, factors.b, "a");
  check(factors.b.size(1) == factors.a.size(0), "b is ", factors.b.sizes(), " and a is ", factors.a.sizes(),
        "; their inner dimensions must be equal");
  const TorchGuards torch_guards;
  const auto& [b, a, scale] = is_wide(factors) ? thinned(factors) : factors;
  const auto wide_b = widened(b, at::kDouble), wide_a = widened(a, at::kDouble);
  const auto norm2 = wide_b.t().mm(wide_b).mul_(wide_a.mm(wide_a.t())).sum().item<double>();
  return std::abs(scale) * std::sqrt(std::max(norm2, 0.0));
}

}  // namespace csulora
