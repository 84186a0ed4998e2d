#include <cfloat>
#include <cmath>

#include "correction_kernels.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace csulora::cuda {
namespace {

/// Index of this thread among those that share blockIdx.y, and how many they are.
__device__ int64_t first_item() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ int64_t item_stride() { return int64_t{gridDim.x} * blockDim.x; }

template <typename T>
__global__ void load_basis_kernel(const ModuleArguments* modules, Side side, int64_t size, double* out) {
  const ModuleArguments& module = modules[blockIdx.y];
  const T* source = static_cast<const T*>(side == Side::left ? module.u : module.v);
  double* target = out + blockIdx.y * size;
  for (int64_t i = first_item(); i < size; i += item_stride()) {
    target[i] = widened(source[i]);
  }
}

/// Entry (row, column) of a factor as it is stored.
template <typename T>
__device__ double stored_entry(const StoredFactor& factor, int64_t module, int64_t row, int64_t column) {
  const ModuleArguments& stored = factor.modules[module];
  if (factor.side == Side::left) {
    return stored.scale * widened(static_cast<const T*>(stored.b)[row * factor.rank + column]);
  }
  return widened(static_cast<const T*>(stored.a)[column * factor.rows + row]);
}

template <typename T>
__global__ void load_factor_kernel(StoredFactor factor, double* split) {
  const int64_t size = factor.rows * factor.rank;
  double* target = split + (2 * int64_t{blockIdx.y} + 1) * size;  // the second half of the module's matrix
  for (int64_t i = first_item(); i < size; i += item_stride()) {
    target[i] = stored_entry<T>(factor, blockIdx.y, i % factor.rows, i / factor.rows);
  }
}

/// One block per column.
__global__ void split_and_normalise_kernel(int64_t rows, int64_t rank, double* split, double* normalised) {
  const int64_t start = (2 * rank * blockIdx.y + blockIdx.x) * rows;
  double* column = split + start;
  double norm2 = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    if (blockIdx.x >= rank) {
      column[i] -= column[i - rank * rows];  // the inside column, which no block writes
    }
    norm2 += column[i] * column[i];
  }
  norm2 = block_sum(norm2);
  const double factor = norm2 > 0 ? 1 / std::sqrt(norm2) : 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    normalised[start + i] = factor * column[i];
  }
}

__global__ void fill_addresses_kernel(double* first, int64_t stride, int64_t count, double** addresses) {
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    addresses[i] = first + i * stride;
  }
}

__global__ void shift_diagonal_kernel(double shift, int64_t size, double* gram, double* identity) {
  const int64_t start = blockIdx.y * size * size;
  for (int64_t i = first_item(); i < size * size; i += item_stride()) {
    const bool diagonal = i % size == i / size;
    gram[start + i] += diagonal ? shift : 0;
    identity[start + i] = diagonal ? 1 : 0;
  }
}

__device__ double gain(double penalty, double energy) { return std::isinf(penalty) ? 0 : 1 / (1 + penalty * energy); }

/// gains_for() of correct/gains.h.
__device__ void set_gains(const Attenuation& attenuation, const double energies[4], double gains[4]) {
  if (attenuation.kind == Attenuation::Kind::gains) {
    const Attenuation::Gains& given = attenuation.gains;
    gains[0] = given.aligned;
    gains[1] = given.left;
    gains[2] = given.right;
    gains[3] = given.off;
  } else {
    const Attenuation::Penalties& penalties = attenuation.penalties;
    gains[0] = gain(penalties.aligned, energies[0]);
    gains[1] = gains[2] = gain(penalties.partial, energies[1] + energies[2]);
    gains[3] = gain(penalties.off, energies[3]);
  }
}

/// Sets everything that follows from the squared norms of the four components.
__device__ void measure_components(const double norms2[4], const Attenuation& attenuation, Measured& measured) {
  const double total = norms2[0] + norms2[1] + norms2[2] + norms2[3];
  double* energies = measured.energies;
  double* gains = measured.gains;
  for (int component = 0; component < 4; ++component) {
    energies[component] = total > 0 ? norms2[component] / total : 0;
  }
  set_gains(attenuation, energies, gains);
  double relative_change2 = 0;
  for (int component = 0; component < 4; ++component) {
    relative_change2 += (1 - gains[component]) * (1 - gains[component]) * energies[component];
  }
  measured.norm = std::sqrt(total);
  measured.relative_change = std::sqrt(relative_change2);
  measured.finite = std::isfinite(total) ? 1 : 0;
}

/// One block per module.
__global__ void attenuate_kernel(const double* components, const ModuleArguments* modules, int64_t size, double* core,
                                 Measured* measured) {
  const int64_t entries = size * size;
  const double* component = components + 4 * blockIdx.x * entries;
  double* result = core + blockIdx.x * entries;
  Measured& mine = measured[blockIdx.x];

  double norms2[4];
  for (int c = 0; c < 4; ++c) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < entries; i += kThreads) {
      sum += component[c * entries + i] * component[c * entries + i];
    }
    norms2[c] = block_sum(sum);
  }
  if (threadIdx.x == 0) {
    measure_components(norms2, modules[blockIdx.x].attenuation, mine);
  }
  __syncthreads();

  double core_norm2 = 0;
  for (int64_t i = threadIdx.x; i < entries; i += kThreads) {
    result[i] = mine.gains[0] * component[i] + mine.gains[1] * component[entries + i] +
                mine.gains[2] * component[2 * entries + i] + mine.gains[3] * component[3 * entries + i];
    core_norm2 += result[i] * result[i];
  }
  core_norm2 = block_sum(core_norm2);
  const bool usable = core_norm2 > 0 && std::isfinite(core_norm2);
  const double factor = usable ? 1 / std::sqrt(core_norm2) : 0;
  for (int64_t i = threadIdx.x; i < entries; i += kThreads) {
    result[i] = usable ? factor * result[i] : 0;
  }
  if (threadIdx.x == 0) {
    mine.core_norm = usable ? std::sqrt(core_norm2) : 0;
  }
}

/// One block per module.
__global__ void measure_undo_kernel(Coordinates coordinates, Stage stage, Measured* measured) {
  const int64_t directions = coordinates.directions;
  const int64_t start = blockIdx.x * directions * coordinates.rank;
  const float* values = coordinates.modules[blockIdx.x].s;
  double overlap = 0;
  double alignment2 = 0;
  for (int64_t i = threadIdx.x; i < directions; i += kThreads) {
    double diagonal = 0;
    for (int64_t j = 0; j < coordinates.rank; ++j) {
      diagonal += coordinates.b[start + j * directions + i] * coordinates.a[start + j * directions + i];
    }
    overlap += values[i] * diagonal;
    alignment2 += double{values[i]} * values[i];
  }
  overlap = block_sum(overlap);
  alignment2 = block_sum(alignment2);
  if (threadIdx.x == 0) {
    Measured& mine = measured[blockIdx.x];
    (stage == Stage::before ? mine.undo : mine.undo_after) = alignment2 == 0 ? 0 : -overlap / alignment2;
  }
}

/// By how much |vectors^T core|^2 may differ from that of the core, 1. Rounding makes far less of it.
constexpr double kOrthonormal = 1e-6;

/// Whether the update is to be handed back as it is.
__device__ bool is_unchanged(const double gains[4], bool same_rank) {
  return same_rank && gains[0] == 1 && gains[1] == 1 && gains[2] == 1 && gains[3] == 1;
}

/// One block per module.
__global__ void balance_kernel(CoreFactors factors, Measured* measured) {
  const int64_t size = factors.size;
  const int64_t rank = factors.rank;
  const double* vectors = factors.vectors + blockIdx.x * size * size;
  const double* projected = factors.projected + blockIdx.x * size * size;
  double* values = factors.values + blockIdx.x * size;
  double* left = factors.left + blockIdx.x * size * rank;
  double* right = factors.right + blockIdx.x * size * rank;
  Measured& mine = measured[blockIdx.x];

  double kept2 = 0;
  double dropped2 = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    double norm2 = 0;
    for (int64_t j = 0; j < size; ++j) {
      norm2 += projected[j * size + i] * projected[j * size + i];
    }
    values[i] = std::sqrt(norm2);
    (i >= size - rank ? kept2 : dropped2) += norm2;
  }
  kept2 = block_sum(kept2);
  dropped2 = block_sum(dropped2);
  if (threadIdx.x == 0) {
    const bool everything = dropped2 == 0 || is_unchanged(mine.gains, 2 * rank == size);
    mine.truncation_error = everything ? 0 : dropped2 / (kept2 + dropped2);
    const bool orthonormal = std::abs(kept2 + dropped2 - 1) <= kOrthonormal;
    mine.failures = mine.core_norm > 0 && !orthonormal ? 1 : 0;
  }
  const double rounding = static_cast<double>(size) * DBL_EPSILON;  // of a core of norm 1
  const double norm = mine.core_norm;
  for (int64_t i = threadIdx.x; i < size * rank; i += kThreads) {
    const int64_t leading = i / size;  // column of left, row of right
    const int64_t other = i % size;
    const int64_t from = size - 1 - leading;
    const double value = values[from];
    const double shared = value > rounding ? std::sqrt(value * norm) : 0;
    left[leading * size + other] = shared * vectors[from * size + other];
    right[other * rank + leading] = shared > 0 ? shared / value * projected[other * size + from] : 0;
  }
}

template <typename T>
__global__ void store_factor_kernel(const double* corrected, StoredFactor stored, int64_t result_rank,
                                    Measured* measured) {
  Measured& mine = measured[blockIdx.y];
  const bool left = stored.side == Side::left;
  T* target = static_cast<T*>(left ? stored.modules[blockIdx.y].result_b : stored.modules[blockIdx.y].result_a);
  const int64_t rows = stored.rows;
  const int64_t size = rows * result_rank;
  const bool unchanged = is_unchanged(mine.gains, result_rank == stored.rank);
  for (int64_t i = first_item(); i < size; i += item_stride()) {
    const int64_t row = left ? i / result_rank : i % rows;
    const int64_t column = left ? i % result_rank : i / rows;
    const double entry = unchanged ? stored_entry<T>(stored, blockIdx.y, row, column)
                                   : corrected[blockIdx.y * size + column * rows + row];
    round_to(target[i], entry);
    if (!std::isfinite(widened(target[i]))) {
      mine.finite = 0;  // whoever writes it writes the same
    }
  }
}

__global__ void count_failures_kernel(const int* statuses, int64_t rounds, int64_t count, Measured* measured) {
  for (int64_t module = first_item(); module < count; module += item_stride()) {
    int failures = 0;
    for (int64_t round = 0; round < rounds; ++round) {
      failures += statuses[round * count + module] != 0;
    }
    measured[module].failures += failures;
  }
}

dim3 block_per(int64_t entries) { return dim3(static_cast<unsigned>(entries)); }

}  // namespace

void load_basis(const ModuleArguments* modules, Side side, Element element, int64_t size, int64_t count, double* out,
                cudaStream_t stream) {
  visit_element(element, [&](auto example) {
    launch(load_basis_kernel<decltype(example)>, grid_for(size, count), stream, "load_basis", modules, side, size, out);
  });
}

void load_factor(const StoredFactor& factor, int64_t count, double* split, cudaStream_t stream) {
  visit_element(factor.element, [&](auto example) {
    launch(load_factor_kernel<decltype(example)>, grid_for(factor.rows * factor.rank, count), stream, "load_factor",
           factor, split);
  });
}

void split_and_normalise(int64_t rows, int64_t rank, int64_t count, double* split, double* normalised,
                         cudaStream_t stream) {
  const dim3 columns(static_cast<unsigned>(2 * rank), static_cast<unsigned>(count));
  launch(split_and_normalise_kernel, columns, stream, "split_and_normalise", rows, rank, split, normalised);
}

void fill_addresses(double* first, int64_t stride, int64_t count, double** addresses, cudaStream_t stream) {
  launch(fill_addresses_kernel, grid_for(count, 1), stream, "fill_addresses", first, stride, count, addresses);
}

void shift_diagonal(double shift, int64_t size, int64_t count, double* gram, double* identity, cudaStream_t stream) {
  launch(shift_diagonal_kernel, grid_for(size * size, count), stream, "shift_diagonal", shift, size, gram, identity);
}

void attenuate(const double* components, const ModuleArguments* modules, int64_t size, int64_t count, double* core,
               Measured* measured, cudaStream_t stream) {
  launch(attenuate_kernel, block_per(count), stream, "attenuate", components, modules, size, core, measured);
}

void measure_undo(const Coordinates& coordinates, Stage stage, int64_t count, Measured* measured, cudaStream_t stream) {
  launch(measure_undo_kernel, block_per(count), stream, "measure_undo", coordinates, stage, measured);
}

void balance(const CoreFactors& factors, int64_t count, Measured* measured, cudaStream_t stream) {
  launch(balance_kernel, block_per(count), stream, "balance", factors, measured);
}

void store_factor(const double* corrected, const StoredFactor& stored, int64_t result_rank, int64_t count,
                  Measured* measured, cudaStream_t stream) {
  visit_element(stored.element, [&](auto example) {
    launch(store_factor_kernel<decltype(example)>, grid_for(stored.rows * result_rank, count), stream, "store_factor",
           corrected, stored, result_rank, measured);
  });
}

void count_failures(const int* statuses, int64_t rounds, int64_t count, Measured* measured, cudaStream_t stream) {
  launch(count_failures_kernel, grid_for(count, 1), stream, "count_failures", statuses, rounds, count, measured);
}

}  // namespace csulora::cuda
