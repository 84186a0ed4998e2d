#include "correct/measurement.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "correct/gains.h"
#include "correct/undo.h"
#include "runtime/check.h"

namespace csulora {
namespace {

using at::Tensor;

/// Squared Frobenius norms of the four components.
Components component_norms2(const SplitFactor& b, const SplitFactor& a) {
  const auto &b_gram = b.gram, &a_gram = a.gram;
  const int64_t r = b_gram.rows() / 2;
  const auto norm2 = [&](int64_t b_first, int64_t a_first) {  // 0 inside, r outside: |B A^T|^2 = <B^T B, A^T A>
    double sum = 0;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        sum += b_gram[b_first + i][b_first + j] * a_gram[a_first + i][a_first + j];
      }
    }
    return std::max(sum, 0.0);
  };
  return {norm2(0, 0), norm2(0, r), norm2(r, 0), norm2(r, r)};
}

/// Whether a split in float32 is good enough for what the gains keep.
bool accurate_in_float(const Measured& update) {
  const auto errors2 = [](const SplitFactor& split) {
    constexpr double kNormal2 = 0x1p-252;  // below 2^-126 digits end
    const int64_t r = split.gram.rows() / 2;
    std::vector<double> result(r);
    for (int64_t i = 0; i < r; ++i) {
      const double length2 = split.gram[i][i] + split.gram[r + i][r + i];
      result[i] = length2 * kFloatRounding * kFloatRounding + kNormal2 * static_cast<double>(split.rows);
    }
    return result;
  };
  const auto& [b, a, result] = update;
  return is_accurate(b.gram, errors2(b), a.gram, errors2(a), result, kFloatTolerance);
}

Measured measured_with(const Subspace& subspace, const Attenuation& attenuation, SplitFactor b, SplitFactor a) {
  const auto norms2 = component_norms2(b, a);
  auto result = result_of(norms2, undo(b.coordinates, a.coordinates, subspace.s), attenuation);
  return {std::move(b), std::move(a), std::move(result)};
}

std::optional<Measured> measured_in_float(const LoraFactors& factors, const Subspace& subspace,
                                          const Attenuation& attenuation) {
  if (!factors.b.is_cpu() || factors.b.scalar_type() == at::kDouble || !fits_float(factors.scale)) {
    return std::nullopt;
  }
  thread_local Tensor b_memory = at::empty({0}, at::kFloat), a_memory = at::empty({0}, at::kFloat);
  auto update = measured_with(subspace, attenuation, split_in_float(factors.b, factors.scale, subspace.u, b_memory),
                              split_in_float(factors.a.t(), 1, subspace.v, a_memory));
  return accurate_in_float(update) ? std::optional(std::move(update)) : std::nullopt;
}

}  // namespace

Correction result_of(const Components& norms2, double undo, const Attenuation& attenuation) {
  Correction result;
  const double total = norms2.aligned + norms2.left + norms2.right + norms2.off;
  if (total > 0) {
    result.energies = {norms2.aligned / total, norms2.left / total, norms2.right / total, norms2.off / total};
  }
  result.norm = std::sqrt(total);
  result.undo = undo;
  result.gains = gains_for(attenuation, result.energies);
  result.relative_change = relative_change(result.gains, result.energies);
  return result;
}

void check_finite(const Correction& result, const std::string& label) {
  check(std::isfinite(result.norm) && std::isfinite(result.undo), label,
        ": the update or the subspace holds NaN, infinity or values too large");
}

bool is_accurate(const SmallMatrix& b_gram, const std::vector<double>& b_errors2, const SmallMatrix& a_gram,
                 const std::vector<double>& a_errors2, const Correction& measured, double tolerance) {
  const int64_t r = b_gram.rows() / 2;
  const auto error2 = [&](int64_t b_first, int64_t a_first) {
    double sum = 0;
    for (int64_t i = 0; i < r; ++i) {
      sum += b_errors2[i] * a_gram[a_first + i][a_first + i] + a_errors2[i] * b_gram[b_first + i][b_first + i];
    }
    return sum;
  };
  const auto& gains = measured.gains;
  const auto& energies = measured.energies;
  const auto kept2 = [&](double aligned, double left, double right, double off) {
    return gains.aligned * gains.aligned * aligned + gains.left * gains.left * left +
           gains.right * gains.right * right + gains.off * gains.off * off;
  };
  const double allowed = tolerance * measured.norm;
  return kept2(error2(0, 0), error2(0, r), error2(r, 0), error2(r, r)) <=
         allowed * allowed * kept2(energies.aligned, energies.left, energies.right, energies.off);
}

bool fits_float(double scale) {
  return std::abs(static_cast<float>(scale) - scale) <= kFloatRounding * std::abs(scale);
}

Measured measured(const LoraFactors& factors, const Subspace& subspace, const Attenuation& attenuation,
                  const std::string& label) {
  auto update = measured_in_float(factors, subspace, attenuation);
  if (!update) {
    update = measured_with(subspace, attenuation, split_in_double(factors.b, factors.scale, subspace.u),
                           split_in_double(factors.a.t(), 1, subspace.v));
  }
  check_finite(update->result, label);
  return std::move(*update);
}

}  // namespace csulora
