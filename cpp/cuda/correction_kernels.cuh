#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "correction.h"
#include "element.h"

// Host launchers of the kernels around the library calls of correction.cpp. All matrices are float64 and column-major
// unless said otherwise; consecutive matrices of a batch of `count` lie one after the other. Nothing waits.
namespace csulora::cuda {

/// One factor of each update and what goes with it.
enum class Side {
  left,  // scale b (rows, rank), the basis u (rows, directions), the result result_b
  right  // a (rank, rows), the basis v (rows, directions), the result result_a
};

/// out (directions, rows) = the bases of a side, of `size` = directions * rows entries each.
void load_basis(const ModuleArguments* modules, Side side, Element element, int64_t size, int64_t count, double* out,
                cudaStream_t stream);

/// The factors of a side as they are stored.
struct StoredFactor {
  const ModuleArguments* modules;
  Side side;
  Element element;
  int64_t rows;
  int64_t rank;
};

/// split (rows, 2 rank) = [not set, factor].
void load_factor(const StoredFactor& factor, int64_t count, double* split, cudaStream_t stream);

/// split = [inside, factor] becomes [inside, factor - inside], and normalised the same with columns of norm 1; columns
/// of norm 0 stay 0.
void split_and_normalise(int64_t rows, int64_t rank, int64_t count, double* split, double* normalised,
                         cudaStream_t stream);

/// addresses[i] = first + i * stride.
void fill_addresses(double* first, int64_t stride, int64_t count, double** addresses, cudaStream_t stream);

/// gram (size, size) += shift I, and identity = I.
void shift_diagonal(double shift, int64_t size, int64_t count, double* gram, double* identity, cudaStream_t stream);

/// Energies and gains from the products of the roots, components (count, 4, size, size) for aligned, left, right and
/// off; core (size, size) = sum_c g_c component_c, divided by its norm, which goes to `measured`. If the components are
/// not finite, the core is 0.
void attenuate(const double* components, const ModuleArguments* modules, int64_t size, int64_t count, double* core,
               Measured* measured, cudaStream_t stream);

/// What the undo of an update b a is measured from.
struct Coordinates {
  const double* b;                 // (directions, rank) U^T b
  const double* a;                 // (directions, rank) V^T a^T
  const ModuleArguments* modules;  // whose s is read
  int64_t directions;
  int64_t rank;
};

/// Sets measured.undo for the updates as they came, measured.undo_after for what they became.
enum class Stage { before, after };
void measure_undo(const Coordinates& coordinates, Stage stage, int64_t count, Measured* measured, cudaStream_t stream);

/// What leads in core = vectors projected, as factors that share each singular value evenly.
struct CoreFactors {
  int64_t size;             // of the core
  int64_t rank;             // to keep
  const double* vectors;    // (size, size) orthonormal, the leading last
  const double* projected;  // (size, size) vectors^T core
  double* values;           // (size) scratch
  double* left;             // (size, rank) out, the leading first
  double* right;            // (rank, size) out
};

/// Sets left, right, measured.truncation_error, and measured.failures: 1 if the vectors of a core that is not 0 are not
/// orthonormal.
void balance(const CoreFactors& factors, int64_t count, Measured* measured, cudaStream_t stream);

/// Writes a corrected factor (rows, result_rank) to the side's result, rounded to what the factor is stored as. Where
/// all gains are 1 and the rank stays, the factor itself is written instead. Clears measured.finite where a value is
/// not.
void store_factor(const double* corrected, const StoredFactor& stored, int64_t result_rank, int64_t count,
                  Measured* measured, cudaStream_t stream);

/// measured.failures += how many of the `rounds` x count statuses of a module are not 0.
void count_failures(const int* statuses, int64_t rounds, int64_t count, Measured* measured, cudaStream_t stream);

}  // namespace csulora::cuda
