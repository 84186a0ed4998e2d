#include "extract/displacement.h"

#include <ATen/ATen.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cmath>
#include <vector>

#include "extract/noise_edge.h"
#include "extract/subtraction.h"
#include "gpu/displacement_device.h"
#include "linalg/products.h"
#include "linalg/row_blocks.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

using at::Tensor;

StorageFormat storage_format(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return {10, -14};
    case at::kBFloat16:
      return {7, -126};
    default:
      return {23, -126};
  }
}

/// Sums over some rows of D, of squares and of what bounds rounding.
struct Sums {
  double norm2 = 0;
  std::vector<double> row_variances;
  std::vector<double> of_columns;  ///< (3, columns), the arrays of ColumnSums
};

/// A matrix's rows as float32, where they lie if they can be read there, else copied into a tile.
class WidenedRows {
 public:
  WidenedRows(const Tensor& matrix, int64_t tile_rows)
      : matrix_(matrix),
        format_(storage_format(matrix.scalar_type())),
        in_place_(matrix.scalar_type() == at::kFloat && matrix.stride(1) == 1),
        tile_(in_place_ ? Tensor() : at::empty({tile_rows, matrix.size(1)}, at::kFloat)) {}

  /// Makes `count` rows from `first` on available.
  void read(int64_t first, int64_t count) {
    if (in_place_) {
      rows_ = matrix_.const_data_ptr<float>() + first * matrix_.stride(0);
      stride_ = matrix_.stride(0);
    } else {
      rows_ = tile_.narrow(0, 0, count).copy_(matrix_.narrow(0, first, count)).const_data_ptr<float>();
      stride_ = matrix_.size(1);
    }
  }

  StoredRow operator[](int64_t row) const { return {rows_ + row * stride_, format_}; }

 private:
  const Tensor& matrix_;
  StorageFormat format_;
  bool in_place_;
  Tensor tile_;
  const float* rows_ = nullptr;
  int64_t stride_ = 0;
};

/// Writes `count` rows of D from `first` on, and of its low-precision copy if there is one, and sums them.
Sums subtract_rows(const Tensor& base, const Tensor& aligned, int64_t first, int64_t count, const Displacement& d) {
  constexpr int64_t kCacheEntries = int64_t{1} << 15;  // stay in a core's cache from one operation to the next
  const int64_t columns = d.matrix.size(1);
  const int64_t step = std::max<int64_t>(1, kCacheEntries / columns);
  WidenedRows before(base, step), after(aligned, step);
  Sums sums;
  sums.of_columns.resize(3 * columns);
  double* const of_columns = sums.of_columns.data();
  const ColumnSums column_sums{of_columns, of_columns + columns, of_columns + 2 * columns};
  DifferenceRow target{d.matrix.mutable_data_ptr<float>() + first * columns, nullptr};
  if (d.low_precision.defined()) {
    target.low_precision =
        reinterpret_cast<uint16_t*>(d.low_precision.mutable_data_ptr<at::BFloat16>()) + first * columns;
  }
  for (int64_t row = first; row < first + count; row += step) {
    const int64_t rows = std::min(step, first + count - row);
    before.read(row, rows);
    after.read(row, rows);
    for (int64_t i = 0; i < rows; ++i) {
      const auto of_row = subtract_row(before[i], after[i], columns, target, column_sums);
      target.entries += columns;
      target.low_precision += d.low_precision.defined() ? columns : 0;
      sums.norm2 += of_row.norm2;
      sums.row_variances.push_back(rounding_variance(of_row.rounding));
    }
  }
  return sums;
}

/// Asks for large pages: the kernel hands out a fresh matrix's small ones slower than the subtraction fills them.
/// A small matrix lies among other memory, which is left as it is.
void prefer_huge_pages([[maybe_unused]] const Tensor& matrix) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kMappedAlone = size_t{32} << 20;
  constexpr uintptr_t kPage = 4096;
  if (matrix.nbytes() >= kMappedAlone) {
    const auto first = reinterpret_cast<uintptr_t>(matrix.mutable_data_ptr());
    const auto begin = (first + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), first + matrix.nbytes() - begin, MADV_HUGEPAGE);  // may be refused
  }
#endif
}

/// An uninitialised matrix in `memory`, which grows if it has to.
Tensor matrix_in(Tensor& memory, int64_t rows, int64_t columns, at::ScalarType dtype) {
  if (!memory.defined() || memory.numel() < rows * columns) {
    memory.reset();  // first, so that both are never there at once
    memory = at::empty({rows * columns}, dtype);
    prefer_huge_pages(memory);
  }
  return memory.narrow(0, 0, rows * columns).view({rows, columns});
}

/// Gives the system what the decomposition before has freed: memory peaks while D and both inputs are there. Where a
/// matrix is large, fresh pages cost next to nothing of what its decomposition does.
void give_back_freed_memory([[maybe_unused]] const Tensor& matrix) {
#ifdef __GLIBC__
  constexpr size_t kLarge = size_t{128} << 20;
  if (matrix.nbytes() >= kLarge) {
    malloc_trim(0);
  }
#endif
}

Displacement displacement_on_cpu(const Tensor& base, const Tensor& aligned, std::optional<double> noise_std,
                                 bool with_low_precision, Workspace& workspace) {
  const int64_t rows = base.size(0);
  const int64_t columns = base.size(1);
  Displacement result;
  result.matrix = matrix_in(workspace.matrix, rows, columns, at::kFloat);
  if (with_low_precision && has_fast_bfloat16(result.matrix)) {
    result.low_precision = matrix_in(workspace.low_precision, rows, columns, at::kBFloat16);
  }
  give_back_freed_memory(result.matrix);
  const int64_t step = rows_per_block(columns);
  std::vector<Sums> parts((rows + step - 1) / step);
  for_each_in_parallel(parts.size(), [&](size_t i) {
    const TorchGuards torch_guards;
    const int64_t row = static_cast<int64_t>(i) * step;
    parts[i] = subtract_rows(base, aligned, row, std::min(step, rows - row), result);
  });
  std::vector<double> row_variances, of_columns(3 * columns), column_variances(columns);
  for (const auto& part : parts) {
    result.norm2 += part.norm2;
    row_variances.insert(row_variances.end(), part.row_variances.begin(), part.row_variances.end());
    std::transform(of_columns.begin(), of_columns.end(), part.of_columns.begin(), of_columns.begin(), std::plus<>());
  }
  for (int64_t i = 0; i < columns; ++i) {
    column_variances[i] = rounding_variance({of_columns[i], of_columns[columns + i], of_columns[2 * columns + i]});
  }
  result.noise_edge = noise_std ? noise_edge(*noise_std, rows, columns) : noise_edge(row_variances, column_variances);
  return result;
}

}  // namespace

Displacement displacement(const Tensor& base, const Tensor& aligned, std::optional<double> noise_std,
                          bool with_low_precision, Workspace* workspace) {
  check_matrix(base, "base");
  check_matrix(aligned, "aligned");
  check_same_device(aligned, base, "aligned");
  check(base.sizes() == aligned.sizes(), "base is ", base.sizes(), " and aligned is ", aligned.sizes(),
        "; both checkpoints must have the same shape");
  check(!noise_std || (std::isfinite(*noise_std) && *noise_std >= 0), "noise_std must be finite and not negative");
  check(base.numel() > 0, "base and aligned are empty");

  Workspace own;
  auto result = base.is_cpu()
                    ? displacement_on_cpu(base, aligned, noise_std, with_low_precision, workspace ? *workspace : own)
                    : displacement_on_device(base, aligned, noise_std);
  check(std::isfinite(result.norm2), "base or aligned holds NaN, infinity or values too large");
  return result;
}

}  // namespace csulora
