#pragma once

#include <ATen/ATen.h>
#include <csulora/correct.h>

#include <cstdint>
#include <limits>

#include "dense.h"

/// Random updates and subspaces, and their dense twins.
namespace cases {

inline constexpr double kTolerance = 1e-5;  // float32 factors
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline const csulora::CorrectionOptions kExact{csulora::RankRule::exact};

inline csulora::LoraFactors random_factors(int64_t rows, int64_t columns, int64_t rank, uint64_t seed = 1,
                                           double scale = 2) {
  return {dense::tensor(dense::gaussian(rows, rank, seed)), dense::tensor(dense::gaussian(rank, columns, seed + 1)),
          scale};
}

inline csulora::Subspace random_subspace(int64_t rows, int64_t columns, int64_t k, at::ScalarType dtype = at::kFloat) {
  return {dense::tensor(dense::orthonormal(rows, k, 11), dtype), at::arange(k, 0, -1).to(at::kFloat),
          dense::tensor(dense::orthonormal(columns, k, 12), dtype)};
}

inline csulora::CorrectionTask task(const csulora::LoraFactors& factors, const csulora::Subspace& subspace,
                                    const csulora::Attenuation& attenuation = csulora::Penalties{}) {
  return {factors, subspace, attenuation, "layer"};
}

inline dense::Matrix update(const csulora::LoraFactors& factors) {
  return factors.scale * (dense::matrix(factors.b) * dense::matrix(factors.a));
}

inline double relative_error(const csulora::Correction& result, const dense::Matrix& reference) {
  return norm(update(result.factors) - reference) / norm(reference);
}

}  // namespace cases
