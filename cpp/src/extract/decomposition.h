#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>

namespace csulora {

/// Singular values below this share of the largest drown in the rounding of float32 entries and products.
inline constexpr double kResolution = 4 * std::numeric_limits<float>::epsilon();

/// Approximate leading singular triples of a matrix, descending.
struct SingularTriples {
  at::Tensor u;      ///< (m, k) float32 or float64
  at::Tensor s;      ///< (k) float64
  at::Tensor v;      ///< (n, k) as u
  at::Tensor upper;  ///< (k + 1) float64, upper estimates of the leading singular values; 0 where there is none
  double largest_energy = 0;  ///< no k directions capture more of |A|_F^2
  at::Tensor computed;        ///< all singular or Ritz values, float64
  int64_t passes = 0;         ///< products with the matrix and its transpose; 0 for a full decomposition
};

/// Says how many of the leading singular values (float64, descending) are targets.
using TargetCount = std::function<int64_t(const at::Tensor& values)>;

/// How accurate the target triples have to be. Those that stand out, before a gap, reach the residual. Those inside a
/// bulk cannot be told from one another: either they reach it, too, or all targets together capture the energy.
struct Accuracy {
  double residual = 0;  ///< |A^T u - s v| <= residual * s
  double energy = 0;    ///< the captured energy is at least 1 - energy of the optimum; 0: residuals alone count
};

struct KrylovOptions {
  int64_t block = 0;       ///< columns of the random start block
  int64_t max_blocks = 0;  ///< give up beyond this depth
  Accuracy accuracy;
  uint64_t seed = 0;
  int64_t most_targets = 0;  ///< there will never be more; the first look is at more Ritz values than that
};

/// Block Golub-Kahan bidiagonalisation with full re-orthogonalisation and Rayleigh-Ritz on the whole Krylov space
/// (Musco & Musco 2015; Golub, Luk & Overton 1981), in float32.
///
/// @param matrix  (m, n) float32
/// @return nothing if max_blocks or float32 did not suffice
std::optional<SingularTriples> block_krylov(const at::Tensor& matrix, const TargetCount& target_count,
                                            const KrylovOptions& options);

/// The same by block Lanczos with the smaller square of a bfloat16 copy of the matrix (Golub & Underwood 1977), refined
/// with the matrix itself.
///
/// @param low_precision  (m, n) bfloat16, products with which must be fast (has_fast_bfloat16)
std::optional<SingularTriples> low_precision_block_krylov(const at::Tensor& matrix, const at::Tensor& low_precision,
                                                          const TargetCount& target_count,
                                                          const KrylovOptions& options);

/// Subspace iteration from a start that all but spans the leading left vectors, in float32. Only residuals are computed
/// with the bfloat16 copy.
///
/// @param start  (b, m) float32, more vectors than there will be targets
/// @return nothing if the start was not good enough
std::optional<SingularTriples> refine(const at::Tensor& matrix, const at::Tensor& low_precision,
                                      const at::Tensor& start, const TargetCount& target_count,
                                      const Accuracy& accuracy);

/// The same from all eigenvalues of the smaller Gram matrix, in float64. Squaring costs half the digits of a value far
/// below the largest, which leaves more of them than a float32 SVD does.
///
/// @param matrix  (m, n) float32
SingularTriples exact_triples(const at::Tensor& matrix, const TargetCount& target_count);

}  // namespace csulora
