#include "paired_products.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "workers.h"

namespace csulora {
namespace {

using at::BFloat16;
using at::Tensor;

/// Terms, and entries of the matrix's other side, of one call of a kernel: what it reads stays in the second-level
/// cache.
constexpr int64_t kTerms = 512;
constexpr int64_t kEntries = 128;

/// Rows 2 i and 2 i + 1 of a block (terms, count), entry by entry side by side, as kernels take their right factor.
void pair_rows(const BFloat16* block, int64_t stride, int64_t terms, int64_t count, uint32_t* pairs) {
  for (int64_t i = 0; i < terms; i += 2, pairs += kEntries) {
    const auto *first = block + i * stride, *second = first + stride;
    for (int64_t j = 0; j < count; ++j) {  // as one number, which compilers turn into vectors
      pairs[j] = static_cast<uint32_t>(first[j].x) | static_cast<uint32_t>(second[j].x) << 16;
    }
  }
}

/// Calls work(first, count) for blocks of [0, size), in parallel.
template <typename Work>
void for_each_block(int64_t size, Work work) {
  for_each_on_torch_threads((size + kEntries - 1) / kEntries, [&](size_t i) {
    const int64_t first = static_cast<int64_t>(i) * kEntries;
    work(first, std::min(kEntries, size - first));
    at::native::cpublas::brgemm_release();
  });
}

/// The first `terms` terms, an even number, for a contiguous matrix (m, n).
void multiply_with_rows(const Tensor& out, const Tensor& rows, const Tensor& matrix, int64_t terms) {
  const int64_t b = rows.size(0), m = rows.size(1), n = matrix.size(1);
  const auto *left = rows.const_data_ptr<BFloat16>(), *right = matrix.const_data_ptr<BFloat16>();
  auto* const product = out.mutable_data_ptr<float>();
  for_each_block(n, [&](int64_t column, int64_t count) {
    std::vector<uint32_t> pairs(kTerms / 2 * kEntries);
    for (int64_t term = 0; term < terms; term += kTerms) {
      const int64_t depth = std::min(kTerms, terms - term);
      pair_rows(right + term * n + column, n, depth, count, pairs.data());
      at::native::cpublas::brgemm(b, count, depth, m, kEntries, n, term > 0, left + term,
                                  reinterpret_cast<const BFloat16*>(pairs.data()), product + column);
    }
  });
}

/// The same for the transpose of a contiguous matrix (n, m): its rows are the kernels' left factor.
void multiply_with_columns(const Tensor& out, const Tensor& rows, const Tensor& matrix, int64_t terms) {
  const int64_t b = rows.size(0), m = matrix.size(0), n = matrix.size(1);
  const auto pairs = rows.narrow(1, 0, terms).contiguous().view(at::kInt).t().contiguous();  // (terms / 2, b)
  const auto* const left = matrix.const_data_ptr<BFloat16>();
  const auto* const right = reinterpret_cast<const BFloat16*>(pairs.const_data_ptr<int>());
  for_each_block(n, [&](int64_t row, int64_t count) {
    const auto product = at::empty({count, b}, at::kFloat);
    for (int64_t term = 0; term < terms; term += kTerms) {
      at::native::cpublas::brgemm(count, b, std::min(kTerms, terms - term), m, b, b, term > 0, left + row * m + term,
                                  right + term * b, product.mutable_data_ptr<float>());
    }
    out.narrow(1, row, count).copy_(product.t());
  });
}

}  // namespace

bool multiplies_pairs() {
  static const bool known = at::cpu::get_cpu_capabilities()["avx512_bf16"] == c10::IValue(true);
  return known && at::hasMKLDNN() && at::globalContext().userEnabledMkldnn();
}

void multiply_pairs(const Tensor& out, const Tensor& rows, const Tensor& matrix) {
  const int64_t m = matrix.size(0), terms = m / 2 * 2;
  (matrix.is_contiguous() ? multiply_with_rows : multiply_with_columns)(out, rows, matrix, terms);
  if (terms < m) {
    out.addmm_(rows.narrow(1, terms, 1).to(at::kFloat), matrix.narrow(0, terms, 1).to(at::kFloat));
  }
}

}  // namespace csulora
