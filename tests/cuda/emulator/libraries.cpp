// The functions of cuBLAS and cuSOLVER that csulora calls, on host memory, by their documentation: which triangle is
// read and written, what is left alone.
#include <ATen/ATen.h>
#include <cublas_v2.h>
#include <cusolverDn.h>

namespace {

/// A column-major matrix.
at::Tensor view(const double* data, int64_t rows, int64_t columns, int64_t leading) {
  return at::from_blob(const_cast<double*>(data), {rows, columns}, {1, leading}, at::kDouble);
}

template <typename Handle>
Handle dummy() {
  static char place;
  return reinterpret_cast<Handle>(&place);
}

}  // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  *handle = dummy<cublasHandle_t>();
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
const char* cublasGetStatusString(cublasStatus_t) { return "emulated"; }

cublasStatus_t cublasDgemmStridedBatched_64(cublasHandle_t, cublasOperation_t left, cublasOperation_t right, int64_t m,
                                            int64_t n, int64_t k, const double* alpha, const double* a, int64_t lda,
                                            long long stride_a, const double* b, int64_t ldb, long long stride_b,
                                            const double* beta, double* c, int64_t ldc, long long stride_c,
                                            int64_t count) {
  if (*beta != 0) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto x = left == CUBLAS_OP_N ? view(a + i * stride_a, m, k, lda) : view(a + i * stride_a, k, m, lda).t();
    const auto y = right == CUBLAS_OP_N ? view(b + i * stride_b, k, n, ldb) : view(b + i * stride_b, n, k, ldb).t();
    view(c + i * stride_c, m, n, ldc).copy_(x.matmul(y).mul_(*alpha));
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDtrsmBatched(cublasHandle_t, cublasSideMode_t side, cublasFillMode_t triangle,
                                  cublasOperation_t operation, cublasDiagType_t diagonal, int m, int n,
                                  const double* alpha, const double* const a[], int lda, double* const b[], int ldb,
                                  int count) {
  if (side != CUBLAS_SIDE_LEFT || triangle != CUBLAS_FILL_MODE_UPPER || operation != CUBLAS_OP_N ||
      diagonal != CUBLAS_DIAG_NON_UNIT) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  for (int i = 0; i < count; ++i) {
    const auto right = view(b[i], m, n, ldb);
    right.copy_(at::linalg_solve_triangular(view(a[i], m, m, lda).triu(), right.mul(*alpha), true));
  }
  return CUBLAS_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  *handle = dummy<cusolverDnHandle_t>();
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t) { return CUSOLVER_STATUS_SUCCESS; }
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t, cudaStream_t) { return CUSOLVER_STATUS_SUCCESS; }
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  *params = dummy<cusolverDnParams_t>();
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t) { return CUSOLVER_STATUS_SUCCESS; }

cusolverStatus_t cusolverDnDpotrfBatched(cusolverDnHandle_t, cublasFillMode_t triangle, int n, double* a[], int lda,
                                         int* info, int count) {
  if (triangle != CUBLAS_FILL_MODE_UPPER) {
    return CUSOLVER_STATUS_NOT_SUPPORTED;
  }
  for (int i = 0; i < count; ++i) {
    const auto matrix = view(a[i], n, n, lda);
    const auto upper = matrix.triu();
    const auto [factor, status] = at::linalg_cholesky_ex(upper + upper.triu(1).t(), true);
    matrix.copy_(factor.triu() + matrix.tril(-1));
    info[i] = status.item<int>();
  }
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t,
                                                   cublasFillMode_t, int64_t n, cudaDataType, const void*, int64_t,
                                                   cudaDataType, const void*, cudaDataType, size_t* device,
                                                   size_t* host, int64_t count) {
  *device = static_cast<size_t>(n * count) * sizeof(double);
  *host = 64;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t mode,
                                        cublasFillMode_t triangle, int64_t n, cudaDataType type, void* a, int64_t lda,
                                        cudaDataType values_type, void* values, cudaDataType compute_type, void*,
                                        size_t, void*, size_t, int* info, int64_t count) {
  if (mode != CUSOLVER_EIG_MODE_VECTOR || triangle != CUBLAS_FILL_MODE_LOWER || type != CUDA_R_64F ||
      values_type != CUDA_R_64F || compute_type != CUDA_R_64F) {
    return CUSOLVER_STATUS_NOT_SUPPORTED;
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto matrix = view(static_cast<double*>(a) + i * lda * n, n, n, lda);
    const auto [eigenvalues, eigenvectors] = at::linalg_eigh(matrix, "L");
    view(static_cast<double*>(values) + i * n, n, 1, n).copy_(eigenvalues.unsqueeze(1));
    matrix.copy_(eigenvectors);
    info[i] = 0;
  }
  return CUSOLVER_STATUS_SUCCESS;
}
}
