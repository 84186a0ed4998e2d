#include "orthonormal.h"

#include <utility>

#include "correction_kernels.cuh"
#include "status.h"

namespace csulora::cuda {
namespace {

/// Exceeds what rounding does to a Gram matrix of columns of norm 1, at any length in use.
constexpr double kShift = 1e-11;

cublasOperation_t operation(const Operand& operand) { return operand.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

}  // namespace

void multiply(const HandleLease& lease, int64_t count, const Product& product, const Operand& left,
              const Operand& right, const Batch& result) {
  constexpr double kOne = 1;
  constexpr double kZero = 0;
  check(cublasDgemmStridedBatched_64(lease.blas(), operation(left), operation(right), product.rows, product.columns,
                                     product.inner, &kOne, left.matrix.data, left.matrix.leading, left.matrix.stride,
                                     right.matrix.data, right.matrix.leading, right.matrix.stride, &kZero, result.data,
                                     result.leading, result.stride, count),
        "cublasDgemmStridedBatched");
}

void orthonormalise(const HandleLease& lease, int64_t count, const Orthonormalisation& work) {
  constexpr double kOne = 1;
  const auto [rows, size, input, result, gram, inverse, gram_addresses, inverse_addresses, statuses] = work;
  const auto order = static_cast<int>(size);
  const auto batch = static_cast<int>(count);
  const Batch grams{gram, size, size * size};
  const Batch inverses{inverse, size, size * size};
  Batch from{input, rows, rows * size};
  Batch to{result, rows, rows * size};
  for (int round = 0; round < kRounds; ++round) {
    multiply(lease, count, {size, size, rows}, {from, true}, {from}, grams);
    shift_diagonal(kShift, size, count, gram, inverse, lease.stream());
    check(cusolverDnDpotrfBatched(lease.solver(), CUBLAS_FILL_MODE_UPPER, order, gram_addresses, order,
                                  statuses + round * count, batch),
          "cusolverDnDpotrfBatched");
    check(cublasDtrsmBatched(lease.blas(), CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT,
                             order, order, &kOne, gram_addresses, order, inverse_addresses, order, batch),
          "cublasDtrsmBatched");
    multiply(lease, count, {rows, size, size}, {from}, {inverses}, to);
    std::swap(from, to);
  }
  static_assert(kRounds % 2 == 1, "the last round must write to the result");
}

}  // namespace csulora::cuda
