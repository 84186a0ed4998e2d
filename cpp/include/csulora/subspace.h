#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace csulora {

/// What is known about a subspace's accuracy, measured on the factors as they are stored.
struct Certificate {
  /// |D|_F^2.
  double displacement_norm2 = 0;

  /// 1 - |D - U S V^T|_F^2 / |D|_F^2, at least; equals sum s^2 / |D|^2 for exact factors. 0 when D = 0.
  double captured_energy = 0;

  /// captured_energy is at least this share of what the best k directions capture. It counts what the residuals leave
  /// open (Fan 1949), and rests on a start block that missed no leading direction. 1 at most; 0 when k = 0.
  double optimal_share = 0;

  /// max over i of max(|D v_i - s_i u_i|, |D^T u_i - s_i v_i|) / s_i.
  double residual = 0;

  /// max(|U^T U - I|_F, |V^T V - I|_F).
  double orthonormality = 0;

  /// Upper estimate of s_{k+1}: the next Ritz value plus its residual, rounding included. A bound after a full
  /// decomposition (`passes` = 0). Otherwise it may fall short by some percent where values crowd and none of them is
  /// kept, or where float32 hardly tells it from zero beside s_1, and by more if the random start block missed a
  /// leading direction.
  double next_value = 0;

  /// So many leading directions stand out: a gap separates them from what follows, and they are known by themselves.
  /// The rest lies inside a bulk, of which any directions are as good as others that capture as much.
  int64_t standing_out = 0;

  /// Bound on the share of the true subspace of those that stand out, left or right, that is missed,
  /// 1 - |U_true^T U|_F^2 / standing_out, from the residuals and the gaps to an upper estimate of the value that
  /// follows them (Wedin 1972, column by column). 1: nothing is known, as where nothing stands out.
  double subspace_error = 1;

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

}  // namespace csulora
