#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "csulora/subspace.h"

namespace csulora {

/// The factors of an update dW = scale * b a.
struct LoraFactors {
  at::Tensor b;        ///< (m, r) float16, bfloat16 or float32, r >= 1
  at::Tensor a;        ///< (r, n) likewise
  double scale = 1.0;  ///< what the adapter format multiplies b a by (alpha / r for plain LoRA)
};

/// One number per component of an update: P dW Q, P dW (I-Q), (I-P) dW Q, (I-P) dW (I-Q).
struct Components {
  double aligned = 0;
  double left = 0;
  double right = 0;
  double off = 0;
};

/// Penalties lambda >= 0 of the closed form g = 1 / (1 + lambda e); infinity removes the component.
/// left and right together are one component, `partial`, with the energy e = e_left + e_right.
struct Penalties {
  double aligned = 0;
  double partial = 1;
  double off = 1;
};

/// Gains in [0, 1], one per component, used as they are.
using Gains = Components;

/// What is kept along each leading singular direction, and how much of the displacement is added:
///
///     X = (I - U (1 - left) U^T) dW (I - V (1 - right) V^T) + U (reinforced S) V^T.
///
/// Each list speaks of the first directions of the subspace, at most all of them; along the others everything is kept.
struct Directions {
  std::vector<double> left;        ///< gains in [0, 1] of what is written along the columns of u
  std::vector<double> right;       ///< of what is read along the columns of v
  std::vector<double> reinforced;  ///< multiples of the singular triples; nothing is added to dW = 0
};

/// How much is kept: by penalty (adapts to the module's energies) or by gain of each component, or along directions.
using Attenuation = std::variant<Penalties, Gains, Directions>;

/// A corrected update X and what was measured. `undo_after` takes u and v for orthonormal; along directions `gains` and
/// `relative_change` do so too.
struct Correction {
  LoraFactors factors;  ///< scale 1, contiguous, rounded once to the dtypes of the factors they replace
  Components energies;  ///< |dW_c|^2 / |dW|^2; they sum to 1, or are all 0 for dW = 0
  Gains gains;          ///< what was applied; along directions |X_c| / |dW_c|, 1 where dW_c is 0
  double norm = 0;      ///< |dW|_F, scale included
  /// |X - dW|_F / |dW|_F before the rank is cut, at most 1 if nothing is added; 0 for dW = 0
  double relative_change = 0;
  /// -<dW, U S V^T> / |S|^2: 1 cancels the alignment inside the subspace, less than 0 adds to it.
  double undo = 0;
  /// -<X, U S V^T> / |S|^2 of the X that the factors hold, at their rank. Their rounding to storage is not counted.
  double undo_after = 0;
  double truncation_error = 0;  ///< |X - X_r|^2 / |X|^2, the energy given up to reach the rank; 0 for X = 0
};

/// The inputs of a module on which a correction acts: with F = p q^T, an update dW for which X' is asked becomes
///
///     X = dW + (X' - dW) F,
///
/// so an input x with F x = 0 meets the update as it came.
struct InputFilter {
  at::Tensor p;  ///< (n, f) float32
  at::Tensor q;  ///< (n, f) float32
};

/// One module of an adapter together with everything its correction needs.
struct CorrectionTask {
  LoraFactors factors;
  Subspace subspace;  ///< u (m, k), s (k), v (n, k); the certificate is not read
  Attenuation attenuation = Penalties{};
  std::string label = "update";                  ///< what error messages call it
  std::optional<InputFilter> input_filter = {};  ///< with Directions alone; absent: all inputs
};

/// Which rank corrected factors have.
enum class RankRule {
  keep,   ///< the input's rank: best approximation of X in Frobenius norm
  exact,  ///< X itself, of rank r or 2r; along directions r + those added, with an input filter r + those changed on
          ///< the left
  fixed   ///< best approximation of at most a given rank
};

/// The least that CorrectionOptions::reference_energy makes of a penalty.
inline constexpr double kLeastPenaltyScale = 0.4;

struct CorrectionOptions {
  RankRule rule = RankRule::keep;
  int64_t rank = 0;  ///< for RankRule::fixed, at least 1

  /// Relative energy e that updates usually have along the directions that Directions name, in (0, 1]; absent: gains
  /// are used as they are. With it all tasks of a call are one adapter, whose own e says how far to go: every gain g of
  /// a direction becomes g / (g + (1 - g) x) with x = max((e / reference_energy)^2, kLeastPenaltyScale): the closed
  /// form 1 / (1 + penalty e^2) where g is the gain of an adapter with the reference energy, but padding an update with
  /// energy elsewhere does not switch its correction off. e is the mean of |U^T dW|^2 / |dW|^2 and |dW V|^2 / |dW|^2,
  /// over all tasks.
  std::optional<double> reference_energy = std::nullopt;
};

/// The closest safe update X = sum_c g_c dW_c (CSULoRA, arXiv 2605.30640), or X along directions, computed in factor
/// space. RankRule::keep keeps one rank more for every triple that is added.
///
/// An update of more columns than its matrix has rows or columns is computed, and returned, as one of as many.
///
/// Of others nothing of size m x n is formed: O((m + n) (k + r) r) operations and two reads of u and v, and a third of
/// the columns that have gains or are added. An input filter of f directions adds O(n (k + r) f) operations and a read
/// of v; along directions X is decomposed only where its rank is cut, or where columns so nearly cancel that rounding
/// them would not be rounding X. On the CPU, products of tall matrices are in float32, or in float64 where the estimate
/// of the float32 error exceeds 5e-6 of |X|: little is kept of much, or most of the update cancels. With an input
/// filter the error may be as large beside |dW|. The result does not depend on the number of threads.
///
/// In a build with CUDA, tensors may be on a GPU, all of them on one; the result is on the same device. All products
/// are in float64. The work goes to torch's current stream, which is waited for once, when what was measured is read.
///
/// @throws InputError for shapes, dtypes, devices, gains, penalties or values (NaN, infinity, overflow) that
///         cannot be used; the message names `task.label`
/// @throws DeviceError, DeviceMemoryError if the GPU fails or its memory runs out
Correction correct(const CorrectionTask& task, const CorrectionOptions& options = {});

/// The same for many modules, in parallel over modules; on the CPU results are bit-identical to one call each, unless
/// options.reference_energy takes all of them as one adapter. On a GPU, where modules of one shape are computed in
/// batches, they are the same bits for the same tasks.
std::vector<Correction> correct(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options = {});

/// The relative energy e of an adapter along the first `directions` of its modules' subspaces, or all that a subspace
/// has, see CorrectionOptions::reference_energy; 0 for an adapter that changes nothing. Rounding may make it exceed 1.
///
/// @param tasks  the adapter's modules, of which factors, subspace and label are used
/// @throws InputError as correct(), and for a negative number of directions
double energy_along(const std::vector<CorrectionTask>& tasks, int64_t directions);

/// The factor of every penalty for an adapter of relative energy `energy`, see CorrectionOptions::reference_energy.
///
/// @return max((energy / reference_energy)^2, kLeastPenaltyScale)
double penalty_scale(double energy, double reference_energy);

/// |dW|_F of an update, in float64 from Gram matrices of its factors, or from b a where that is smaller; not finite
/// where the factors are not.
///
/// @throws InputError for shapes, dtypes or devices that do not fit each other
double norm(const LoraFactors& factors);

}  // namespace csulora
