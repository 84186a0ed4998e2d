#include "gpu/displacement_device.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <cuda_runtime_api.h>

#include <vector>

#include "cuda/displacement.cuh"
#include "extract/noise_edge.h"
#include "gpu/element.h"
#include "gpu/stream.h"

namespace csulora {
namespace {

/// The variances of lines, rows or columns, from their rounding sums (3, lines).
std::vector<double> variances(const at::Tensor& rounding_sums) {
  const auto copy = rounding_sums.to(at::kCPU);
  const int64_t lines = copy.size(1);
  const auto* const sums = copy.const_data_ptr<double>();
  std::vector<double> result(lines);
  for (int64_t i = 0; i < lines; ++i) {
    result[i] = rounding_variance({sums[i], sums[lines + i], sums[2 * lines + i]});
  }
  return result;
}

}  // namespace

Displacement displacement_on_device(const at::Tensor& base, const at::Tensor& aligned,
                                    std::optional<double> noise_std) {
  const c10::DeviceGuard guard(base.device());
  const int64_t rows = base.size(0);
  const int64_t columns = base.size(1);
  const auto row_major_base = base.contiguous();
  const auto row_major_aligned = aligned.contiguous();
  Displacement result;
  result.matrix = at::empty({rows, columns}, base.options().dtype(at::kFloat));
  const auto wide = base.options().dtype(at::kDouble);
  const auto row_norms2 = at::empty({rows}, wide);
  const auto row_rounding = at::empty({3, rows}, wide);
  const auto column_rounding = at::empty({3, (rows + cuda::kRowsPerSum - 1) / cuda::kRowsPerSum, columns}, wide);

  cuda::subtract({row_major_base.data_ptr(), element_of(base)}, {row_major_aligned.data_ptr(), element_of(aligned)},
                 rows, columns, result.matrix.mutable_data_ptr<float>(),
                 {row_norms2.mutable_data_ptr<double>(), row_rounding.mutable_data_ptr<double>(),
                  column_rounding.mutable_data_ptr<double>()},
                 static_cast<cudaStream_t>(current_stream(base.device())));

  result.norm2 = row_norms2.sum().item<double>();
  result.noise_edge = noise_std ? noise_edge(*noise_std, rows, columns)
                                : noise_edge(variances(row_rounding), variances(column_rounding.sum(1)));
  return result;
}

}  // namespace csulora
