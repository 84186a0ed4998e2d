#include "extract/convergence.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace csulora {
namespace {

/// How well the first unwanted Ritz value must have converged, as a share of it or of the gap to it. A Ritz value errs
/// by the square of its residual, so this leaves well under a percent.
constexpr double kNextTolerance = 0.1;

/// How far the first unwanted value may still be off. A tenth of the gap to it serves as well as a tenth of itself
/// where how many are targets does not hinge on it.
double allowed_of_next(const RitzValues& ritz, int64_t count, const TargetCount& target_count) {
  const double next = ritz.values[count].item<double>();
  double scale = next;
  if (count > 0 && target_count(ritz.values + ritz.residuals) == count) {
    scale = std::max(scale, ritz.values[count - 1].item<double>() - next);
  }
  return std::max(kNextTolerance * scale, 2 * kResolution * ritz.values[0].item<double>());
}

}  // namespace

bool converged(const RitzValues& ritz, int64_t count, const TargetCount& target_count, double tolerance) {
  const auto& [values, residuals] = ritz;
  return residuals[count].item<double>() <= allowed_of_next(ritz, count, target_count) &&
         residuals.narrow(0, 0, count).le(values.narrow(0, 0, count) * tolerance).all().item<bool>();
}

}  // namespace csulora
