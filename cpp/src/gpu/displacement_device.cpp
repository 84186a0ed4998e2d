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

std::vector<double> on_host(const at::Tensor& values) {
  const auto copy = values.to(at::kCPU);
  const auto* const first = copy.const_data_ptr<double>();
  return {first, first + copy.numel()};
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
  const auto row_noise = at::empty({rows}, wide);
  const auto column_noise = at::empty({(rows + cuda::kRowsPerSum - 1) / cuda::kRowsPerSum, columns}, wide);

  cuda::subtract({row_major_base.data_ptr(), element_of(base)}, {row_major_aligned.data_ptr(), element_of(aligned)},
                 rows, columns, result.matrix.mutable_data_ptr<float>(),
                 {row_norms2.mutable_data_ptr<double>(), row_noise.mutable_data_ptr<double>(),
                  column_noise.mutable_data_ptr<double>()},
                 static_cast<cudaStream_t>(current_stream(base.device())));

  result.norm2 = row_norms2.sum().item<double>();
  result.noise_edge =
      noise_std ? noise_edge(*noise_std, rows, columns) : noise_edge(on_host(row_noise), on_host(column_noise.sum(0)));
  return result;
}

}  // namespace csulora
