#include "correct/thin.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "correct/storage.h"

namespace csulora {
namespace {

/// Columns that are widened to float64 at a time, so that factors take little more memory than they have.
constexpr int64_t kColumns = 4096;

}  // namespace

bool is_wide(const LoraFactors& factors) { return factors.b.size(1) > std::min(factors.b.size(0), factors.a.size(1)); }

LoraFactors thinned(const LoraFactors& factors) {
  const auto& [b, a, scale] = factors;
  const auto dtype = b.is_cpu() ? at::kDouble : at::kFloat;
  auto product = at::zeros({b.size(0), a.size(1)}, b.options().dtype(dtype));
  for (int64_t first = 0; first < b.size(1); first += kColumns) {
    const int64_t count = std::min(kColumns, b.size(1) - first);
    product.addmm_(widened(b.narrow(1, first, count), dtype), widened(a.narrow(0, first, count), dtype));
  }
  const auto identity = at::eye(std::min(product.size(0), product.size(1)), product.options());
  return product.size(0) <= product.size(1) ? LoraFactors{identity, product, scale}
                                            : LoraFactors{product, identity, scale};
}

}  // namespace csulora
