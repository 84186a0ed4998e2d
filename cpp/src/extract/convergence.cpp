#include "extract/convergence.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace csulora {
namespace {

using at::Tensor;

/// How well the first unwanted Ritz value must have converged, as a share of it or of the gap to it. A Ritz value errs
/// by the square of its residual, so this leaves well under a percent.
constexpr double kNextTolerance = 0.1;

/// A direction stands out before what follows if that lies lower by this share.
constexpr double kGap = 0.1;

/// Residual of a value inside a bulk, in multiples of what its energy may lack: the captured energy alone would say
/// little about small values after large ones.
constexpr double kResidualShare = 5;

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

/// The largest residual of the leading `count` triples, as a share of their values.
double largest_residual(const RitzValues& ritz, int64_t count) {
  if (count == 0) {
    return 0;
  }
  const auto values = ritz.values.narrow(0, 0, count).clamp_min(std::numeric_limits<double>::min());
  return ritz.residuals.narrow(0, 0, count).div(values).max().item<double>();
}

/// By what factor the leading `count` triples have not converged, or the next value is not known well enough, or as
/// good as zero, to say that it is no target and to measure the gap to it.
double not_converged(const RitzValues& ritz, int64_t count, const TargetCount& target_count, double tolerance) {
  return std::max(largest_residual(ritz, count) / tolerance,
                  ritz.residuals[count].item<double>() / allowed_of_next(ritz, count, target_count));
}

/// How many of the leading `count` values are followed by a gap.
int64_t standing_out(const RitzValues& ritz, int64_t count) {
  const auto before = ritz.values.narrow(0, 0, count);
  const auto after = upper_values(ritz, count).narrow(0, 1, count);
  const auto followed_by_gap = after.le(before * (1 - kGap)).nonzero();
  return followed_by_gap.numel() > 0 ? followed_by_gap[-1].item<int64_t>() + 1 : 0;
}

/// By what factor those that stand out have not converged, or the energy and every value of the targets and of the
/// value after them are too far from the optimum. What says most is looked at first, and settles it if it is too far.
double not_captured(const RitzValues& ritz, int64_t count, const Accuracy& accuracy) {
  const int64_t with_next = count + 1;
  const double residual = largest_residual(ritz, with_next) / (kResidualShare * accuracy.energy);
  if (!(residual <= 1)) {
    return residual;
  }
  const double energy = ritz.values.narrow(0, 0, with_next).square().sum().item<double>();
  const double missing = (1 - energy / largest_energy(ritz, with_next)) / accuracy.energy;
  return std::max({residual, missing, largest_residual(ritz, standing_out(ritz, count)) / accuracy.residual});
}

}  // namespace

double shortfall(const RitzValues& ritz, int64_t count, const TargetCount& target_count, const Accuracy& accuracy) {
  const double residual = not_converged(ritz, count, target_count, accuracy.residual);
  return residual > 1 && accuracy.energy > 0 ? std::min(residual, not_captured(ritz, count, accuracy)) : residual;
}

RitzValues::RitzValues(Tensor ritz_values, Tensor vectors)
    : values(std::move(ritz_values)),
      residual_vectors(std::move(vectors)),
      residuals(residual_vectors.norm(2, 1).add_(values[0], kResolution)) {}

double largest_energy(const RitzValues& ritz, int64_t count) {
  if (count == 0) {
    return 0;
  }
  const auto values = ritz.values.narrow(0, 0, count);
  const auto beside = ritz.residual_vectors.narrow(0, 0, count) * values.unsqueeze(1);
  const auto beside_sum = at::linalg_eigvalsh(beside.mm(beside.t())).clamp_min_(0).sqrt_().sum();
  const auto rounding = values.sum() * values[0] * kResolution;
  return (values.square().sum() + beside_sum + rounding).item<double>();
}

at::Tensor upper_values(const RitzValues& ritz, int64_t count) {
  return ritz.values.narrow(0, 0, count + 1) + ritz.residuals.narrow(0, 0, count + 1);
}

}  // namespace csulora
