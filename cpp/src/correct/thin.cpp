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
  product.mul_(scale);
  const bool by_rows = product.size(0) <= product.size(1);
  // Rows or columns of length 0 may be multiplied by anything.
  const auto lengths = product.norm(2, at::IntArrayRef{by_rows ? 1 : 0}).sqrt_();
  const auto diagonal = at::diag(lengths), rest = lengths.masked_fill(lengths.eq(0), 1);
  return by_rows ? LoraFactors{diagonal, product.div_(rest.unsqueeze(1)), 1}
                 : LoraFactors{product.div_(rest), diagonal, 1};
}

}  // namespace csulora
