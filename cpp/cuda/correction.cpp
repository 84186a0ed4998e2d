#include "correction.h"

#include <algorithm>
#include <vector>

#include "arena.h"
#include "correction_kernels.cuh"
#include "orthonormal.h"
#include "status.h"

namespace csulora::cuda {
namespace {

/// What NVIDIA recommends for Hopper.
constexpr int64_t kBlasWorkspace = int64_t{32} << 20;

/// A factor of the updates, B or A^T, and what is computed of it.
struct Factor {
  StoredFactor stored;
  double* coordinates;  // (k, r) basis^T factor; later (k, result rank) of the corrected factor
  double* orthonormal;  // (rows, 2r)
  double* roots;        // (2r, 2r) [inside, outside] = orthonormal roots
};

/// The workspace. Matrices are float64, column-major, one per module.
struct Layout {
  Layout(const CorrectionShape& shape, Arena& arena) {
    const int64_t count = shape.count;
    const int64_t size = 2 * shape.rank;
    const int64_t longer = std::max(shape.rows, shape.columns);
    split = arena.take<double>(count * longer * size);
    spare = arena.take<double>(count * longer * std::max(shape.directions, size));
    for (double*& coordinates : coordinates) {
      coordinates = arena.take<double>(count * shape.directions * std::max(shape.rank, shape.result_rank));
    }
    orthonormal[0] = arena.take<double>(count * shape.rows * size);
    orthonormal[1] = arena.take<double>(count * shape.columns * size);
    for (double** matrices : {&roots[0], &roots[1], &gram, &inverse, &core, &square, &projected}) {
      *matrices = arena.take<double>(count * size * size);
    }
    components = arena.take<double>(4 * count * size * size);
    values = arena.take<double>(count * size);
    left = arena.take<double>(count * size * shape.result_rank);
    right = arena.take<double>(count * size * shape.result_rank);
    gram_addresses = arena.take<double*>(count);
    inverse_addresses = arena.take<double*>(count);
    statuses = arena.take<int>(kStatuses * count);
  }

  static constexpr int64_t kStatuses = 2 * kRounds + 1;  // of both orthonormalisations and the eigenvectors

  double* split;           // (longer side, 2r) [inside, outside]; later the corrected factor
  double* spare;           // (longer side, max(k, 2r)) the basis; in between what is being made orthonormal
  double* coordinates[2];  // (k, max(r, result rank))
  double* orthonormal[2];  // (side, 2r)
  double* roots[2];        // (2r, 2r)
  double* gram;            // (2r, 2r)
  double* inverse;         // (2r, 2r)
  double* components;      // (4, 2r, 2r) aligned, left, right, off
  double* core;            // (2r, 2r)
  double* square;          // (2r, 2r) core core^T; later its eigenvectors
  double* projected;       // (2r, 2r)
  double* values;          // (2r)
  double* left;            // (2r, result rank)
  double* right;           // (result rank, 2r)
  double** gram_addresses;
  double** inverse_addresses;
  int* statuses;
};

}  // namespace

struct CorrectionPlan::Implementation {
  CorrectionShape shape;
  const HandleLease& lease;
  size_t solver_bytes = 0;
  std::vector<std::byte> solver_host;

  Implementation(const CorrectionShape& batch_shape, const HandleLease& where) : shape(batch_shape), lease(where) {
    size_t host_bytes = 0;
    check(cusolverDnXsyevBatched_bufferSize(lease.solver(), lease.params(), CUSOLVER_EIG_MODE_VECTOR,
                                            CUBLAS_FILL_MODE_LOWER, size(), CUDA_R_64F, nullptr, size(), CUDA_R_64F,
                                            nullptr, CUDA_R_64F, &solver_bytes, &host_bytes, shape.count),
          "cusolverDnXsyevBatched_bufferSize");
    solver_host.resize(host_bytes);
  }

  int64_t size() const { return 2 * shape.rank; }
  Batch square_batch(double* data) const { return {data, size(), size() * size()}; }

  /// The basis of a factor's side widened, row-major (rows, k): its transpose.
  Batch basis_of(const StoredFactor& stored, const Layout& layout) const {
    const int64_t size = shape.directions * stored.rows;
    load_basis(stored.modules, stored.side, shape.basis, size, shape.count, layout.spare, lease.stream());
    return {layout.spare, shape.directions, size};
  }

  /// Splits a factor at its side's subspace and makes it orthonormal.
  void decompose(const Factor& factor, const Layout& layout, int* statuses) const {
    const int64_t count = shape.count;
    const int64_t rows = factor.stored.rows;
    const int64_t rank = shape.rank;
    const int64_t directions = shape.directions;
    const Batch inside{layout.split, rows, rows * size()};
    const Batch all{layout.split + rows * rank, rows, rows * size()};
    load_factor(factor.stored, count, layout.split, lease.stream());
    if (directions > 0) {
      const Batch basis = basis_of(factor.stored, layout);
      const Batch coordinates{factor.coordinates, directions, directions * rank};
      multiply(lease, count, {directions, rank, rows}, {basis}, {all}, coordinates);
      multiply(lease, count, {rows, rank, directions}, {basis, true}, {coordinates}, inside);
    } else {
      const size_t pitch = sizeof(double) * rows * size();
      check(cudaMemset2DAsync(layout.split, pitch, 0, pitch / 2, count, lease.stream()), "cudaMemset2DAsync");
    }
    split_and_normalise(rows, rank, count, layout.split, layout.spare, lease.stream());
    orthonormalise(lease, count,
                   {rows, size(), layout.spare, factor.orthonormal, layout.gram, layout.inverse, layout.gram_addresses,
                    layout.inverse_addresses, statuses});
    const Batch orthonormal{factor.orthonormal, rows, rows * size()};
    multiply(lease, count, {size(), size(), rows}, {orthonormal, true}, {inside}, square_batch(factor.roots));
  }

  /// The products of the roots that make up the components of the update: aligned, left, right, off.
  void form_components(const Layout& layout) const {
    const int64_t half = size() * shape.rank;  // entries of the inside columns, which come first
    for (int component = 0; component < 4; ++component) {
      const Batch left = square_batch(layout.roots[0] + (component / 2) * half);
      const Batch right = square_batch(layout.roots[1] + (component % 2) * half);
      const Batch product{layout.components + component * size() * size(), size(), 4 * size() * size()};
      multiply(lease, shape.count, {size(), size(), shape.rank}, {left}, {right, true}, product);
    }
  }

  /// Projects the core on its leading left singular vectors.
  void truncate(const Layout& layout, void* solver_workspace, Measured* measured) {
    const Batch core = square_batch(layout.core);
    const Batch vectors = square_batch(layout.square);
    multiply(lease, shape.count, {size(), size(), size()}, {core}, {core, true}, vectors);
    // The first release of this routine needed zeroed memory (cuSOLVER 11.7.1).
    check(cudaMemsetAsync(solver_workspace, 0, solver_bytes, lease.stream()), "cudaMemsetAsync");
    check(cusolverDnXsyevBatched(lease.solver(), lease.params(), CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER,
                                 size(), CUDA_R_64F, layout.square, size(), CUDA_R_64F, layout.values, CUDA_R_64F,
                                 solver_workspace, solver_bytes, solver_host.data(), solver_host.size(),
                                 layout.statuses + 2 * kRounds * shape.count, shape.count),
          "cusolverDnXsyevBatched");
    multiply(lease, shape.count, {size(), size(), size()}, {vectors, true}, {core}, square_batch(layout.projected));
    const CoreFactors factors{size(),        shape.result_rank, layout.square, layout.projected,
                              layout.values, layout.left,       layout.right};
    balance(factors, shape.count, measured, lease.stream());
  }

  /// Forms a corrected factor, writes it rounded, and takes its coordinates.
  void store(const Factor& factor, const Operand& mix, const Layout& layout, Measured* measured) const {
    const int64_t rows = factor.stored.rows;
    const Batch orthonormal{factor.orthonormal, rows, rows * size()};
    const Batch corrected{layout.split, rows, rows * shape.result_rank};
    multiply(lease, shape.count, {rows, shape.result_rank, size()}, {orthonormal}, mix, corrected);
    store_factor(layout.split, factor.stored, shape.result_rank, shape.count, measured, lease.stream());
    if (shape.directions > 0) {
      const Batch coordinates{factor.coordinates, shape.directions, shape.directions * shape.result_rank};
      multiply(lease, shape.count, {shape.directions, shape.result_rank, rows}, {basis_of(factor.stored, layout)},
               {corrected}, coordinates);
    }
  }
};

CorrectionPlan::CorrectionPlan(const CorrectionShape& shape, const HandleLease& lease)
    : implementation_(std::make_unique<Implementation>(shape, lease)) {}

CorrectionPlan::~CorrectionPlan() = default;

size_t CorrectionPlan::workspace_bytes() const {
  Arena arena(nullptr);
  Layout layout(implementation_->shape, arena);
  arena.take<std::byte>(kBlasWorkspace);
  arena.take<std::byte>(static_cast<int64_t>(implementation_->solver_bytes));
  return arena.used();
}

size_t CorrectionPlan::bytes_per_module(const CorrectionShape& shape) {
  Arena arena(nullptr);
  auto one = shape;
  one.count = 1;
  Layout layout(one, arena);
  return arena.used();
}

void CorrectionPlan::run(const ModuleArguments* modules, Measured* measured, void* workspace) {
  auto& plan = *implementation_;
  const auto& shape = plan.shape;
  const auto stream = plan.lease.stream();
  Arena arena(workspace);
  const Layout layout(shape, arena);
  plan.lease.use_workspace(arena.take<std::byte>(kBlasWorkspace), kBlasWorkspace);
  void* solver_workspace = arena.take<std::byte>(static_cast<int64_t>(plan.solver_bytes));

  const Factor b{{modules, Side::left, shape.b, shape.rows, shape.rank},
                 layout.coordinates[0],
                 layout.orthonormal[0],
                 layout.roots[0]};
  const Factor a{{modules, Side::right, shape.a, shape.columns, shape.rank},
                 layout.coordinates[1],
                 layout.orthonormal[1],
                 layout.roots[1]};
  const int64_t entries = plan.size() * plan.size();
  fill_addresses(layout.gram, entries, shape.count, layout.gram_addresses, stream);
  fill_addresses(layout.inverse, entries, shape.count, layout.inverse_addresses, stream);
  plan.decompose(b, layout, layout.statuses);
  plan.decompose(a, layout, layout.statuses + kRounds * shape.count);
  plan.form_components(layout);
  attenuate(layout.components, modules, plan.size(), shape.count, layout.core, measured, stream);
  measure_undo({b.coordinates, a.coordinates, modules, shape.directions, shape.rank}, Stage::before, shape.count,
               measured, stream);
  plan.truncate(layout, solver_workspace, measured);
  const Batch left{layout.left, plan.size(), plan.size() * shape.result_rank};
  const Batch right{layout.right, shape.result_rank, plan.size() * shape.result_rank};
  plan.store(b, {left}, layout, measured);
  plan.store(a, {right, true}, layout, measured);
  measure_undo({b.coordinates, a.coordinates, modules, shape.directions, shape.result_rank}, Stage::after, shape.count,
               measured, stream);
  count_failures(layout.statuses, Layout::kStatuses, shape.count, measured, stream);
}

}  // namespace csulora::cuda
