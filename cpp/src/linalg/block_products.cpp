#include "linalg/block_products.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

#include "linalg/matrix_view.h"
#include "linalg/outer_products.h"
#include "linalg/products.h"
#include "linalg/tall_products.h"
#include "linalg/widest_vectors.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

using at::BFloat16;
using at::Tensor;

/// Terms, and entries of the matrix's other side, of one call of a kernel: what it reads stays in the second-level
/// cache.
template <typename Sum>
constexpr int64_t kTerms = 512;
template <>
constexpr int64_t kTerms<double> = kFloatTerms;
constexpr int64_t kEntries = 128;

template <typename Entry>
constexpr int64_t kPaired = 1;  ///< entries that kernels take together
template <>
constexpr int64_t kPaired<BFloat16> = 2;

/// A matrix, or the corner of one, row after row.
template <typename Entry>
struct Block {
  Entry* entries;
  int64_t stride;
};

struct Shape {
  int64_t rows, terms, columns;
};

/// sums = left (rows, terms) right (terms, columns), which is added where it is not the first one.
template <typename Entry>
void add_product(Block<float> sums, Shape shape, Block<const Entry> left, Block<const Entry> right, bool first) {
  at::native::cpublas::brgemm(shape.rows, shape.columns, shape.terms, left.stride, right.stride, sums.stride, !first,
                              left.entries, right.entries, sums.entries);
}

template <typename Sum>
struct AddEntries {
  template <int kLanes>
  CSULORA_INLINED static void run(const float* entries, int64_t count, bool first, Sum* sums) {
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = first ? entries[i] : sums[i] + entries[i];
    }
  }
};

/// The same for sums without gaps between their rows.
template <typename Entry>
void add_product(Block<double> sums, Shape shape, Block<const Entry> left, Block<const Entry> right, bool first) {
  thread_local std::vector<float> product;
  product.resize(shape.rows * shape.columns);
  add_product(Block<float>{product.data(), shape.columns}, shape, left, right, true);
  run_widest<AddEntries<double>>(product.data(), shape.rows * shape.columns, first, sums.entries);
}

/// Two rows, entry by entry side by side.
struct PairRows {
  template <int kLanes>
  CSULORA_INLINED static void run(const uint16_t* first, const uint16_t* second, int64_t columns, int64_t ahead,
                                  uint32_t* pairs) {
    constexpr int64_t kCacheLine = 64 / sizeof *first;
    for (int64_t j = 0; j < columns; j += kCacheLine) {  // short pieces of rows are nothing that a CPU foresees
      __builtin_prefetch(first + ahead + j);
      __builtin_prefetch(second + ahead + j);
    }
    for (int64_t j = 0; j < columns; ++j) {
      pairs[j] = static_cast<uint32_t>(first[j]) | static_cast<uint32_t>(second[j]) << 16;
    }
  }
};

/// A block (terms, columns) as kernels take their right factor.
Block<const BFloat16> as_right_factor(Block<const BFloat16> block, Shape shape, std::vector<uint32_t>& pairs) {
  constexpr int64_t kRowsAhead = 16;
  pairs.resize(shape.terms / 2 * shape.columns);
  const auto* const rows = reinterpret_cast<const uint16_t*>(block.entries);
  for (int64_t i = 0; i < shape.terms; i += 2) {
    run_widest<PairRows>(rows + i * block.stride, rows + (i + 1) * block.stride, shape.columns,
                         kRowsAhead * block.stride, pairs.data() + i / 2 * shape.columns);
  }
  return {reinterpret_cast<const BFloat16*>(pairs.data()), shape.columns};
}

/// Rows (b, terms) as the transpose of kernels' right factor.
template <typename Entry>
Tensor transposed_factor(const Tensor& rows) {
  return kPaired<Entry> == 1 ? rows.t().contiguous()
                             : rows.contiguous().view(at::kInt).t().contiguous().view(rows.scalar_type());
}

/// Calls work(first, count) for blocks of [0, size), of so many each, in parallel.
template <typename Work>
void for_each_block(int64_t size, int64_t block, Work work) {
  for_each_in_parallel((size + block - 1) / block, [&](size_t i) {
    const int64_t first = static_cast<int64_t>(i) * block;
    work(first, std::min(block, size - first));
    at::native::cpublas::brgemm_release();
  });
}

/// out = rows matrix for a contiguous matrix (m, n).
template <typename Sum>
void multiply_with_rows(const Tensor& out, const Tensor& rows, const Tensor& matrix) {
  const int64_t b = rows.size(0), m = rows.size(1), n = matrix.size(1);
  const auto factor = at::zeros({tall::padded(m, outer::kRowStep), b}, rows.options());
  factor.narrow(0, 0, m).copy_(rows.t());
  const auto *left = factor.const_data_ptr<float>(), *right = matrix.const_data_ptr<float>();
  for_each_block(n, outer::kStrip, [&](int64_t column, int64_t count) {
    const auto product = at::empty({outer::kStrip / outer::kWidth, b, outer::kWidth}, rows.options());
    const auto sums = at::empty(product.sizes(), out.options());
    for (int64_t term = 0; term < m; term += kTerms<Sum>) {
      const int64_t terms = std::min(kTerms<Sum>, m - term);
      product.zero_();
      outer::add_products({right + term * n + column, terms, count, n}, contiguous_view(left + term * b, terms, b),
                          product.mutable_data_ptr<float>());
      run_widest<AddEntries<Sum>>(product.const_data_ptr<float>(), product.numel(), term == 0,
                                  sums.template mutable_data_ptr<Sum>());
    }
    out.narrow(1, column, count).copy_(sums.transpose(0, 1).reshape({b, outer::kStrip}).narrow(1, 0, count));
  });
}

/// The same for the first `terms` terms of bfloat16 numbers.
void multiply_with_rows(const Tensor& out, const Tensor& rows, const Tensor& matrix, int64_t terms) {
  const int64_t b = rows.size(0), m = rows.size(1), n = matrix.size(1);
  const auto *left = rows.const_data_ptr<BFloat16>(), *right = matrix.const_data_ptr<BFloat16>();
  auto* const product = out.mutable_data_ptr<float>();
  for_each_block(n, kEntries, [&](int64_t column, int64_t count) {
    std::vector<uint32_t> pairs;
    for (int64_t term = 0; term < terms; term += kTerms<float>) {
      const Shape shape{b, std::min(kTerms<float>, terms - term), count};
      const auto factor = as_right_factor({right + term * n + column, n}, shape, pairs);
      add_product(Block<float>{product + column, n}, shape, {left + term, m}, factor, term == 0);
    }
  });
}

/// The same for the transpose of a contiguous matrix (n, m): its rows are the kernels' left factor.
template <typename Sum, typename Entry>
void multiply_with_columns(const Tensor& out, const Tensor& rows, const Tensor& matrix, int64_t terms) {
  const int64_t b = rows.size(0), m = matrix.size(0), n = matrix.size(1);
  const auto factor = transposed_factor<Entry>(rows.narrow(1, 0, terms));
  const auto *left = matrix.const_data_ptr<Entry>(), *right = factor.template const_data_ptr<Entry>();
  for_each_block(n, kEntries, [&](int64_t row, int64_t count) {
    const auto product = at::empty({count, b}, out.scalar_type());
    const Block<Sum> sums{product.template mutable_data_ptr<Sum>(), b};
    for (int64_t term = 0; term < terms; term += kTerms<Sum>) {
      const Shape shape{count, std::min(kTerms<Sum>, terms - term), b};
      add_product<Entry>(sums, shape, {left + row * m + term, m}, {right + term * b, b}, term == 0);
    }
    out.narrow(1, row, count).copy_(product.t());
  });
}

template <typename Sum, typename Entry>
void multiply(const Tensor& out, const Tensor& rows, const Tensor& matrix) {
  const int64_t m = matrix.size(0), terms = m / kPaired<Entry> * kPaired<Entry>;
  if (!matrix.is_contiguous()) {
    multiply_with_columns<Sum, Entry>(out, rows, matrix, terms);
  } else if constexpr (std::is_same_v<Entry, float>) {
    multiply_with_rows<Sum>(out, rows, matrix);
  } else {
    multiply_with_rows(out, rows, matrix, terms);
  }
  if (terms < m) {
    out.addmm_(rows.narrow(1, terms, 1).to(at::kFloat), matrix.narrow(0, terms, 1).to(at::kFloat));
  }
}

/// Whether oneDNN makes a kernel: it may be told to do without what the CPU has (ONEDNN_MAX_CPU_ISA), and says so then.
template <typename Entry>
bool makes_kernels() {
  const Entry left[2] = {}, right[2] = {};
  float product = 0;
  try {
    add_product<Entry>(Block<float>{&product, 1}, {1, 2, 1}, {left, 2}, {right, 1}, true);
    at::native::cpublas::brgemm_release();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

bool multiplies_pairs() {
  return at::cpu::get_cpu_capabilities()["avx512_bf16"] == c10::IValue(true) && makes_kernels<BFloat16>();
}

}  // namespace

bool multiplies_blocks(at::ScalarType type) {
  static const bool singly = makes_kernels<float>(), in_pairs = multiplies_pairs();
  return at::globalContext().userEnabledMkldnn() && (type == at::kFloat ? singly : in_pairs);
}

void multiply_blocks(const Tensor& out, const Tensor& rows, const Tensor& matrix) {
  if (matrix.scalar_type() == at::kBFloat16) {
    multiply<float, BFloat16>(out, rows, matrix);
  } else if (out.scalar_type() == at::kFloat) {
    multiply<float, float>(out, rows, matrix);
  } else {
    multiply<double, float>(out, rows, matrix);
  }
}

}  // namespace csulora
