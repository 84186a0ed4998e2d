#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace csulora {

/// How the leading singular subspace of a displacement is computed.
struct ExtractOptions {
  /// Number of singular directions to keep, or the most to keep when `energy` is set; at least 1.
  /// More than min(m, n) means all of them.
  int64_t rank = 64;

  /// Keep the fewest directions that capture this share of |D|^2, in (0, 1]; absent: keep `rank`.
  std::optional<double> energy;

  /// Convergence: every kept triple must reach |D^T u - s v| <= tolerance * s. In (0, 1).
  double tolerance = 1e-3;

  /// Keep directions whose singular value lies below the rounding noise of the two checkpoints.
  bool keep_noise = false;

  /// Standard deviation of the storage rounding of one entry of D; absent: computed from the dtypes and
  /// the magnitudes of both matrices (give it when they were dequantised).
  std::optional<double> noise_std;

  /// Storage type of u and v: float16, bfloat16 or float32. The certificate holds for the rounded factors.
  at::ScalarType factor_dtype = at::kHalf;

  /// Seed of the random start block. Same seed, inputs, thread count and version: same bits.
  uint64_t seed = 0;
};

/// What is known about a subspace's accuracy, measured in float64 on the factors as they are stored.
struct Certificate {
  /// |D|_F^2.
  double displacement_norm2 = 0;

  /// 1 - |D - U S V^T|_F^2 / |D|_F^2; equals sum s^2 / |D|^2 for exact factors. 0 when D = 0.
  double captured = 0;

  /// max over i of max(|D v_i - s_i u_i|, |D^T u_i - s_i v_i|) / s_i.
  double residual = 0;

  /// max(|U^T U - I|_F, |V^T V - I|_F).
  double orthonormality = 0;

  /// Upper estimate of s_{k+1}: the next Ritz value plus its residual (exact for small matrices).
  double next_value = 0;

  /// Bound on the share of the true leading left or right subspace that is missed, 1 - |U_true^T U|_F^2 / k,
  /// from the residuals and the gaps s_i - next_value (Wedin 1972, column by column). 1: nothing is known.
  double missed = 1;

  /// sigma (sqrt m + sqrt n): no singular value below it can be told from storage rounding.
  double noise_edge = 0;

  /// Computed singular values above `noise_edge`; never more than were computed.
  int64_t above_noise = 0;

  /// Products with D and D^T that the Krylov method took; 0 for an exact SVD.
  int64_t passes = 0;
};

/// The leading singular triples of one displacement, D ~ u diag(s) v^T.
struct Subspace {
  at::Tensor u;  ///< (m, k) in the storage type, orthonormal columns; k may be 0.
  at::Tensor s;  ///< (k) float32, descending.
  at::Tensor v;  ///< (n, k) in the storage type, orthonormal columns.
  Certificate certificate{};
};

/// Truncated SVD of the displacement D = aligned - base.
///
/// Randomized block Krylov (Musco & Musco 2015) in the form of a block Golub-Kahan bidiagonalisation with full
/// re-orthogonalisation, Rayleigh-Ritz, and stopping on residuals; an exact SVD where the matrix is small or the
/// Krylov space would not stay small. D is formed in float32; peak memory is about twice D in float32.
///
/// @param base     (m, n) float16, bfloat16 or float32 on the CPU
/// @param aligned  same shape; the dtype may differ
/// @throws InputError for shapes, dtypes, devices, options or values (NaN, infinity) that cannot be used
Subspace extract_subspace(const at::Tensor& base, const at::Tensor& aligned,
                          const ExtractOptions& options = {});

/// Recomputes the certificate of stored factors from the matrices themselves, trusting nothing that came with them.
///
/// @param base, aligned  as for extract_subspace
/// @param subspace       u (m, k), s (k), v (n, k); its certificate is not read
/// @param options        tolerance, noise_std and seed are used
/// @throws InputError as extract_subspace, and for factors that do not fit the matrices
Certificate certify(const at::Tensor& base, const at::Tensor& aligned, const Subspace& subspace,
                    const ExtractOptions& options = {});

}  // namespace csulora
