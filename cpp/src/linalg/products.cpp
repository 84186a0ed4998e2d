#include "linalg/products.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "linalg/block_products.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"

// Part of every torch that is built with MKL; null in others. torch's own product would round the sums to bfloat16.
extern "C" void cblas_gemm_bf16bf16f32(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                                       const void* a, int lda, const void* b, int ldb, float beta, float* c, int ldc)
    __attribute__((weak));

namespace csulora {
namespace {

using at::Tensor;

/// Calls work(first, count) for blocks of the rows or columns of a factor with so many terms each, in parallel. What is
/// small makes one block: starting threads would take longer.
template <typename Work>
void for_blocks(int64_t block, int64_t size, int64_t terms, Work work) {
  constexpr int64_t kSmall = int64_t{1} << 19;
  const int64_t step = terms * size <= kSmall ? std::max<int64_t>(size, 1) : block;
  for_each_in_parallel((size + step - 1) / step, [&](size_t i) {
    const TorchGuards torch_guards;
    const int64_t first = static_cast<int64_t>(i) * step;
    work(first, std::min(step, size - first));
  });
}

template <typename Work>
void for_column_blocks(int64_t terms, int64_t columns, Work work) {
  for_blocks(512, columns, terms, work);
}

void multiply_with_mkl(const Tensor& out, const Tensor& rows, const Tensor& matrix) {
  constexpr int kRowMajor = 101, kAsItIs = 111, kTransposed = 112;
  const bool transposed = !matrix.is_contiguous();
  const int64_t m = matrix.size(0), n = matrix.size(1), stride = transposed ? m : n;
  const auto* const entries = matrix.const_data_ptr<at::BFloat16>();
  const auto as_int = [](int64_t size) { return static_cast<int>(size); };
  for_column_blocks(m, n, [&](int64_t first, int64_t count) {
    cblas_gemm_bf16bf16f32(kRowMajor, kAsItIs, transposed ? kTransposed : kAsItIs, as_int(rows.size(0)), as_int(count),
                           as_int(m), 1, rows.const_data_ptr(), as_int(m), entries + first * (transposed ? m : 1),
                           as_int(stride), 0, out.mutable_data_ptr<float>() + first, as_int(n));
  });
}

/// Whether MKL uses the unit of a CPU that multiplies tiles of bfloat16 numbers. torch packs matrices for that unit,
/// and for nothing else.
bool multiplies_tiles() { return cblas_gemm_bf16bf16f32 && at::native::cpublas::could_pack(at::kBFloat16); }

/// Whether rows of entries of a matrix, or of its transpose, lie one after the other.
bool is_plain(const Tensor& matrix) { return matrix.is_contiguous() || matrix.t().is_contiguous(); }

void multiply_float(Tensor out, const Tensor& rows, const Tensor& matrix) {
  if (matrix.is_cpu() && is_plain(matrix) && multiplies_blocks(at::kFloat)) {
    multiply_blocks(out, rows.contiguous(), matrix);
  } else if (out.scalar_type() == at::kFloat) {
    at::mm_out(out, rows, matrix);
  } else {
    out.zero_();
    const int64_t m = matrix.size(0);
    for (int64_t term = 0; term < m; term += kFloatTerms) {
      const int64_t terms = std::min(kFloatTerms, m - term);
      out.add_(rows.narrow(1, term, terms).mm(matrix.narrow(0, term, terms)));
    }
  }
}

void multiply_low_precision(Tensor out, const Tensor& rows, const Tensor& matrix) {
  if (matrix.is_cpu() && multiplies_tiles()) {
    multiply_with_mkl(out, rows, matrix);
  } else if (matrix.is_cpu() && multiplies_blocks(at::kBFloat16)) {
    multiply_blocks(out, rows, matrix);
  } else {
    at::mm_out(out, rows.to(at::kFloat), matrix.to(at::kFloat));
  }
}

}  // namespace

bool has_fast_bfloat16(const Tensor& matrix) {
  return matrix.is_cpu() && (multiplies_tiles() || multiplies_blocks(at::kBFloat16));
}

void add_product(const Tensor& out, const Tensor& left, const Tensor& right, double scale) {
  if (!out.is_cpu()) {
    out.addmm_(left, right, 1, scale);
    return;
  }
  for_column_blocks(right.size(0), right.size(1), [&](int64_t first, int64_t count) {
    out.narrow(1, first, count).addmm_(left, right.narrow(1, first, count), 1, scale);
  });
}

Tensor product(const Tensor& left, const Tensor& right) {
  auto out = at::zeros({left.size(0), right.size(1)}, left.options());
  add_product(out, left, right, 1);
  return out;
}

Tensor inner_products(const Tensor& left, const Tensor& right) {
  constexpr int64_t kRows = 40;
  if (!left.is_cpu()) {
    return left.mm(right.t());
  }
  auto out = at::empty({left.size(0), right.size(0)}, left.options());
  for_blocks(kRows, left.size(0), left.size(1), [&](int64_t first, int64_t count) {
    auto rows = out.narrow(0, first, count);
    at::mm_out(rows, left.narrow(0, first, count), right.t());
  });
  return out;
}

void multiply(const Tensor& out, const Tensor& rows, const Tensor& matrix) {
  if (matrix.scalar_type() == at::kFloat) {
    multiply_float(out, rows, matrix);
  } else {
    multiply_low_precision(out, rows.to(at::kBFloat16).contiguous(), matrix);
  }
}

}  // namespace csulora
