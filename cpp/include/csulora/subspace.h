#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "csulora/options.h"

namespace csulora {

/// What is known about a subspace's accuracy, measured on the factors as they are stored.
struct Certificate {
  /// |D|_F^2.
  double displacement_norm2 = 0;

  /// 1 - |D - U S V^T|_F^2 / |D|_F^2, at least; equals sum s^2 / |D|^2 for exact factors. 0 when D = 0.
  double captured = 0;

  /// max over i of max(|D v_i - s_i u_i|, |D^T u_i - s_i v_i|) / s_i.
  double residual = 0;

  /// max(|U^T U - I|_F, |V^T V - I|_F).
  double orthonormality = 0;

  /// Upper estimate of s_{k+1}: the next Ritz value plus its residual, rounding included. A bound after a full
  /// decomposition (`passes` = 0). Otherwise it may fall short by some percent where values crowd and none of them is
  /// kept, or where float32 hardly tells it from zero beside s_1, and by more if the random start block missed a
  /// leading direction.
  double next_value = 0;

  /// Bound on the share of the true leading left or right subspace that is missed, 1 - |U_true^T U|_F^2 / k,
  /// from the residuals and the gaps s_i - next_value (Wedin 1972, column by column). 1: nothing is known.
  double missed = 1;

  /// Largest singular value that the storage rounding of both matrices can have, sigma (sqrt m + sqrt n) for errors of
  /// one standard deviation sigma: nothing below it can be told from rounding.
  double noise_edge = 0;

  /// At least so many singular values lie above `noise_edge`: those that were computed, which never exceed the true
  /// ones. The exact number after a full decomposition.
  int64_t above_noise = 0;

  /// Products with D and D^T that the Krylov method took; 0 for a full decomposition.
  int64_t passes = 0;
};

/// The leading singular triples of one displacement, D ~ u diag(s) v^T.
struct Subspace {
  at::Tensor u;  ///< (m, k) in the storage type, orthonormal columns; k may be 0.
  at::Tensor s;  ///< (k) float32, descending.
  at::Tensor v;  ///< (n, k) in the storage type, orthonormal columns.
  Certificate certificate{};
};

/// Checks factors that come from outside: shapes and dtypes fit, s is finite, positive and descending, and the columns
/// of u and v are orthonormal as far as their storage type allows. Orthonormality is probed with a few fixed random
/// vectors, which costs one read of u and v; NaN and infinity fail it too.
///
/// @throws InputError that says which factor is wrong
void validate(const Subspace& subspace);

/// The same for many, each with a label, on a CPU in parallel. The message names the first that is wrong by its label.
void validate(const std::vector<std::pair<std::string, Subspace>>& subspaces);

/// Memory on the CPU that an extraction leaves to the next one rather than to the system, whose fresh pages cost much
/// of what the arithmetic does. It grows to the largest displacement: 4 bytes per entry, and 2 for a bfloat16 copy. For
/// one call at a time.
struct Workspace {
  at::Tensor matrix;  ///< float32, flat
  at::Tensor rough;   ///< bfloat16, flat
};

/// Truncated SVD of the displacement D = aligned - base.
///
/// Randomized block Krylov (Musco & Musco 2015) in the form of a block Golub-Kahan bidiagonalisation with full
/// re-orthogonalisation, Rayleigh-Ritz, and stopping on residuals; a full decomposition where the matrix is small or
/// the Krylov space would not stay small. D is formed in float32; peak memory is about twice D in float32, and with the
/// Gram matrix of its shorter side, some four times that in float64, if the full decomposition is needed.
///
/// A CPU that multiplies tiles of bfloat16 numbers builds the Krylov space with a bfloat16 copy of D, and refines what
/// it holds by subspace iteration with D itself until the residuals meet the tolerance.
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

/// Recomputes the certificate of stored factors from the matrices themselves, trusting nothing that came with them.
///
/// @param base, aligned  as for extract_subspace
/// @param subspace       u (m, k), s (k), v (n, k); its certificate is not read
/// @param options        tolerance, noise_std and seed are used
/// @throws InputError as extract_subspace, and for factors that do not fit the matrices
Certificate certify(const at::Tensor& base, const at::Tensor& aligned, const Subspace& subspace,
                    const ExtractOptions& options = {});

}  // namespace csulora
