#include "products.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include "paired_products.h"

// Part of every torch that is built with MKL; null in others. torch's own product would round the sums to bfloat16.
extern "C" void cblas_gemm_bf16bf16f32(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                                       const void* a, int lda, const void* b, int ldb, float beta, float* c, int ldc)
    __attribute__((weak));

namespace csulora {
namespace {

using at::Tensor;

void multiply_with_mkl(const Tensor& out, const Tensor& rows, const Tensor& matrix) {
  constexpr int kRowMajor = 101, kAsItIs = 111, kTransposed = 112;
  const bool transposed = !matrix.is_contiguous();
  const int b = static_cast<int>(rows.size(0)), m = static_cast<int>(matrix.size(0)),
            n = static_cast<int>(matrix.size(1));
  cblas_gemm_bf16bf16f32(kRowMajor, kAsItIs, transposed ? kTransposed : kAsItIs, b, n, m, 1, rows.const_data_ptr(), m,
                         matrix.const_data_ptr(), transposed ? m : n, 0, out.mutable_data_ptr<float>(), n);
}

/// Whether MKL uses the unit of a CPU that multiplies tiles of bfloat16 numbers. torch packs matrices for that unit,
/// and for nothing else.
bool multiplies_tiles() { return cblas_gemm_bf16bf16f32 && at::native::cpublas::could_pack(at::kBFloat16); }

}  // namespace

bool has_fast_bfloat16(const Tensor& matrix) { return matrix.is_cpu() && (multiplies_tiles() || multiplies_pairs()); }

void multiply(Tensor out, const Tensor& rows, const Tensor& matrix) {
  if (matrix.scalar_type() == at::kFloat) {
    at::mm_out(out, rows, matrix);
  } else if (matrix.is_cpu() && multiplies_tiles()) {
    multiply_with_mkl(out, rows.to(at::kBFloat16).contiguous(), matrix);
  } else if (matrix.is_cpu() && multiplies_pairs()) {
    multiply_pairs(out, rows.to(at::kBFloat16).contiguous(), matrix);
  } else {
    at::mm_out(out, rows.to(at::kBFloat16).to(at::kFloat), matrix.to(at::kFloat));
  }
}

}  // namespace csulora
