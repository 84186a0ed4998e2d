#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "csulora/subspace.h"

namespace csulora {

/// How the leading singular subspace of a displacement is computed.
struct ExtractOptions {
  /// Number of singular directions to keep, or the most where `energy` or `above_bulk` is set; at least 1.
  /// More than min(m, n) means all of them.
  int64_t rank = 64;

  /// Keep the fewest directions that capture this share of |D|^2, in (0, 1]; absent: keep `rank`.
  std::optional<double> energy;

  /// Of `rank` directions, keep those alone that stand out of a bulk: as if what follows them were white noise of its
  /// energy, above the threshold at which keeping a direction errs least (Gavish & Donoho 2014).
  bool above_bulk = false;

  /// Convergence: every kept triple that stands out must reach |D^T u - s v| <= tolerance * s. In (0, 1).
  double tolerance = 1e-3;

  /// Inside a bulk, where no gap separates directions, they are accepted as soon as all that are kept capture at least
  /// 1 - energy_tolerance of what the best ones do, and the residual of each is at most 5 energy_tolerance s. In
  /// [0, 0.1]; 0: every triple must reach `tolerance`.
  double energy_tolerance = 0.01;

  /// Keep directions that hardly stand out of the rounding noise of the two checkpoints, or not at all. Otherwise their
  /// singular value must lie above the noise edge: 1.15 to 1.41 times it where the edge is computed, which is where
  /// keeping a direction begins to err less than leaving it out (Gavish & Donoho 2014).
  bool keep_noise = false;

  /// Standard deviation of the storage rounding of one entry of D; absent: computed from the dtypes and
  /// the magnitudes of both matrices (give it when they were dequantised, as a bound).
  std::optional<double> noise_std;

  /// Storage type of u and v: float16, bfloat16 or float32. The certificate holds for the rounded factors.
  at::ScalarType factor_dtype = at::kHalf;

  /// Seed of the random start block. Same seed, inputs, device, thread count and version: same bits.
  uint64_t seed = 0;
};

/// Memory on the CPU that an extraction leaves to the next one rather than to the system, whose fresh pages cost much
/// of what the arithmetic does. It grows to the largest displacement: 4 bytes per entry, and 2 for a bfloat16 copy. For
/// one call at a time.
struct Workspace {
  at::Tensor matrix;         ///< float32, flat
  at::Tensor low_precision;  ///< bfloat16, flat
};

/// Truncated SVD of the displacement D = aligned - base.
///
/// Randomized block Krylov (Musco & Musco 2015) in the form of a block Golub-Kahan bidiagonalisation with full
/// re-orthogonalisation, Rayleigh-Ritz, and stopping on residuals and captured energy; a full decomposition where the
/// matrix is small or the Krylov space would not stay small. D is formed in float32; peak memory is about twice D in
/// float32, and with the Gram matrix of its shorter side, some four times that in float64, if the full decomposition is
/// needed.
///
/// A CPU that multiplies tiles of bfloat16 numbers searches by block Lanczos with the smaller square of a bfloat16 copy
/// of D. Subspace iteration with D itself refines what that finds until the residuals meet the tolerance.
///
/// On a GPU float32 products are made without TF32, whatever torch's settings allow. The certificate is measured with
/// float64 products, or on a CPU with float32 ones that are summed in float64 where the factors are rounded to half
/// precision; what those may round away counts against it then.
///
/// @param base       (m, n) float16, bfloat16 or float32, on the CPU or, in a build with CUDA, on a GPU; so is the
///                   result
/// @param aligned    same shape and device; the dtype may differ
/// @param workspace  where D is formed on a CPU, or null: in memory of its own
/// @throws InputError for shapes, dtypes, devices, options or values (NaN, infinity) that cannot be used
Subspace extract_subspace(const at::Tensor& base, const at::Tensor& aligned, const ExtractOptions& options = {},
                          Workspace* workspace = nullptr);

/// A displacement to be decomposed.
struct ExtractTask {
  at::Tensor base;                    ///< as for extract_subspace
  at::Tensor aligned;                 ///< same shape and device
  std::string label{"displacement"};  ///< what messages call it
  std::optional<double> noise_std{};  ///< as in the options
};

/// extract_subspace of a task, which lets go of both matrices as soon as D is formed. Mapped or temporary ones that
/// nobody else holds are not in memory during the decomposition.
///
/// @param task     its matrices are undefined afterwards
/// @param options  noise_std is not read
/// @throws InputError as above, beginning with the task's label
Subspace extract_subspace(ExtractTask&& task, const ExtractOptions& options = {}, Workspace* workspace = nullptr);

/// extract_subspace for many small matrices, such as a model's experts: on a CPU one list of tasks for all cores, each
/// matrix on one thread. A result depends neither on the number of threads nor on the other tasks.
///
/// @param options  for all of them; noise_std is not read
/// @throws InputError as extract_subspace, of the first task that cannot be used, beginning with its label
std::vector<Subspace> extract_subspaces(const std::vector<ExtractTask>& tasks, const ExtractOptions& options = {});

/// Recomputes the certificate of stored factors from the matrices themselves, trusting nothing that came with them.
///
/// @param base, aligned  as for extract_subspace
/// @param subspace       u (m, k), s (k), v (n, k); its certificate is not read
/// @param options        tolerance, energy_tolerance, noise_std and seed are used
/// @param standing_out   how many leading directions subspace_error is for; absent: those that stand out
/// @throws InputError as extract_subspace, and for factors that do not fit the matrices
Certificate certify(const at::Tensor& base, const at::Tensor& aligned, const Subspace& subspace,
                    const ExtractOptions& options = {}, std::optional<int64_t> standing_out = {});

}  // namespace csulora
