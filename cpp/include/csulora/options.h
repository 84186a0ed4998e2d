#pragma once

#include <c10/core/ScalarType.h>

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

  /// Seed of the random start block. Same seed, inputs, device, thread count and version: same bits.
  uint64_t seed = 0;
};

/// Which rank a corrected pair has.
enum class RankRule {
  keep,   ///< the input's rank: best approximation of X in Frobenius norm
  exact,  ///< X itself, of rank r or 2r; along directions r + those added, in a scope r + those changed on the left
  fixed   ///< best approximation of at most a given rank
};

/// The least that CorrectionOptions::usual_energy makes of a penalty.
inline constexpr double kLeastStrength = 0.4;

struct CorrectionOptions {
  RankRule rule = RankRule::keep;
  int64_t rank = 0;  ///< for RankRule::fixed, at least 1

  /// Relative energy e that updates usually have along the directions that Directions name, in (0, 1]; absent: gains
  /// are used as they are. With it all tasks of a call are one adapter, whose own e says how far to go: every gain g of
  /// a direction becomes g / (g + (1 - g) x) with x = max((e / usual_energy)^2, kLeastStrength): the closed form
  /// 1 / (1 + penalty e^2) where g is the gain of an adapter with the usual energy, but padding an update with energy
  /// elsewhere does not switch its correction off. e is the mean of |U^T dW|^2 / |dW|^2 and |dW V|^2 / |dW|^2, over all
  /// tasks.
  std::optional<double> usual_energy = std::nullopt;
};

}  // namespace csulora
