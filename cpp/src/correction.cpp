#include "csulora/correction.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"
#include "correction_device.h"
#include "directions.h"
#include "factors.h"
#include "result_rank.h"
#include "split.h"
#include "storage.h"
#include "truncation.h"
#include "workers.h"

namespace csulora {
namespace {

using at::Tensor;

/// Squared Frobenius norms of the four parts.
Parts part_norms2(const SplitFactor& b, const SplitFactor& a) {
  const auto &b_gram = b.gram, &a_gram = a.gram;
  const int64_t r = b_gram.rows() / 2;
  const auto norm2 = [&](int64_t b_part, int64_t a_part) {  // 0 inside, r outside: |B A^T|^2 = <B^T B, A^T A>
    double sum = 0;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        sum += b_gram[b_part + i][b_part + j] * a_gram[a_part + i][a_part + j];
      }
    }
    return std::max(sum, 0.0);
  };
  return {norm2(0, 0), norm2(0, r), norm2(r, 0), norm2(r, r)};
}

double undo(const SplitFactor& b, const SplitFactor& a, const Tensor& singular_values) {
  const auto s = singular_values.to(at::kDouble).contiguous();
  const double* const values = s.const_data_ptr<double>();
  const int64_t k = s.size(0), r = b.coordinates.columns();
  double overlap = 0, alignment2 = 0;  // <dW, U S V^T> and |S|^2
  for (int64_t i = 0; i < k; ++i) {
    const double* const left = b.coordinates[i];
    overlap += values[i] * std::inner_product(left, left + r, a.coordinates[i], 0.0);
    alignment2 += values[i] * values[i];
  }
  return alignment2 == 0 ? 0 : -overlap / alignment2;
}

double gain(double penalty, double energy) { return std::isinf(penalty) ? 0 : 1 / (1 + penalty * energy); }

Gains gains_for(const Attenuation& attenuation, const Parts& energies) {
  if (const auto* gains = std::get_if<Gains>(&attenuation)) {
    return *gains;
  }
  const auto& penalties = std::get<Penalties>(attenuation);
  const double partial = gain(penalties.partial, energies.left + energies.right);
  return {gain(penalties.aligned, energies.aligned), partial, partial, gain(penalties.off, energies.off)};
}

bool keep_everything(const Gains& gains) {
  return gains.aligned == 1 && gains.left == 1 && gains.right == 1 && gains.off == 1;
}

/// Whether float32 splits are good enough for what the gains keep: the errors of b's columns times the parts of a's,
/// and the other way round, are small beside |X|. They are not where little is kept of much, or much cancels.
bool accurate_in_float(const SplitFactor& b, const SplitFactor& a, const Gains& gains, const Parts& norms2) {
  constexpr double kTolerance = 5e-6;
  constexpr double kNormal2 = 0x1p-252;  // below 2^-126 digits end
  const auto &b_gram = b.gram, &a_gram = a.gram;
  const int64_t r = b_gram.rows() / 2;
  const auto error2 = [&](int64_t b_part, int64_t a_part) {
    double sum = 0;
    for (int64_t i = 0; i < r; ++i) {
      const double b_error2 = (b_gram[i][i] + b_gram[r + i][r + i]) * kFloatRounding * kFloatRounding;
      const double a_error2 = (a_gram[i][i] + a_gram[r + i][r + i]) * kFloatRounding * kFloatRounding;
      sum += (b_error2 + kNormal2 * b.rows) * a_gram[a_part + i][a_part + i] +
             (a_error2 + kNormal2 * a.rows) * b_gram[b_part + i][b_part + i];
    }
    return sum;
  };
  const auto kept2 = [&](double aligned, double left, double right, double off) {
    return gains.aligned * gains.aligned * aligned + gains.left * gains.left * left +
           gains.right * gains.right * right + gains.off * gains.off * off;
  };
  return kept2(error2(0, 0), error2(0, r), error2(r, 0), error2(r, r)) <=
         kTolerance * kTolerance * kept2(norms2.aligned, norms2.left, norms2.right, norms2.off);
}

/// Whether float32 holds a scale as well as it holds other numbers; it has few digits for those near 2^-149.
bool fits_float(double scale) {
  return std::abs(static_cast<float>(scale) - scale) <= kFloatRounding * std::abs(scale);
}

void check_share(double value, const char* part, const std::string& label) {
  check(value >= 0 && value <= 1, label, ": gain `", part, "` is ", value, "; it must lie in [0, 1]");
}

void check_penalty(double value, const char* part, const std::string& label) {
  check(value >= 0, label, ": penalty `", part, "` is ", value, "; it must be 0 or more (infinity removes the part)");
}

void check_attenuation(const CorrectionTask& task) {
  if (const auto* gains = std::get_if<Gains>(&task.attenuation)) {
    check_share(gains->aligned, "aligned", task.label);
    check_share(gains->left, "left", task.label);
    check_share(gains->right, "right", task.label);
    check_share(gains->off, "off", task.label);
  } else {
    const auto& penalties = std::get<Penalties>(task.attenuation);
    check_penalty(penalties.aligned, "aligned", task.label);
    check_penalty(penalties.partial, "partial", task.label);
    check_penalty(penalties.off, "off", task.label);
  }
}

void check_task(const CorrectionTask& task, const CorrectionOptions& options) {
  const auto& [b, a, scale] = task.pair;
  const auto& [u, s, v, certificate] = task.subspace;
  check_matrix(b, task.label + ": b");
  check_matrix(a, task.label + ": a");
  check(b.size(1) == a.size(0) && b.size(1) >= 1, task.label, ": b is ", b.sizes(), " and a is ", a.sizes(),
        "; their inner dimensions must be equal and at least 1");
  check(std::isfinite(scale), task.label, ": the scale is not finite");
  check_factors(task.subspace, task.label + ": the subspace's ");
  check_same_device(a, b, task.label + ": a");
  check_same_device(u, b, task.label + ": the subspace's u");
  check(u.size(0) == b.size(0) && v.size(0) == a.size(1), task.label, ": the update is ", b.size(0), " x ", a.size(1),
        " and the subspace is for ", u.size(0), " x ", v.size(0));
  check(options.rule != RankRule::fixed || options.rank >= 1, "rank is ", options.rank, "; it must be at least 1");
  check_attenuation(task);
}

double changed_share(const Gains& gains, const Parts& energies) {
  const auto removed = [](double g, double energy) { return (1 - g) * (1 - g) * energy; };
  return std::sqrt(removed(gains.aligned, energies.aligned) + removed(gains.left, energies.left) +
                   removed(gains.right, energies.right) + removed(gains.off, energies.off));
}

/// What both factors' splits say of the update, and what is to be done with it.
struct Measured {
  SplitFactor b;
  SplitFactor a;
  Parts norms2;
  Correction result;  // without its pair
};

Measured measure(const CorrectionTask& task, SplitFactor b, SplitFactor a) {
  Measured update{std::move(b), std::move(a), {}, {}};
  update.norms2 = part_norms2(update.b, update.a);
  const auto& norms2 = update.norms2;
  const double total = norms2.aligned + norms2.left + norms2.right + norms2.off;
  auto& result = update.result;
  if (total > 0) {
    result.energies = {norms2.aligned / total, norms2.left / total, norms2.right / total, norms2.off / total};
  }
  result.norm = std::sqrt(total);
  result.undo = undo(update.b, update.a, task.subspace.s);
  result.gains = gains_for(task.attenuation, result.energies);
  result.change = changed_share(result.gains, result.energies);
  return update;
}

Correction correct_one(const CorrectionTask& task, const CorrectionOptions& options) {
  check_task(task, options);
  const c10::NoGradGuard no_grad;
  const auto& [pair, subspace, attenuation, label] = task;
  thread_local Tensor b_memory = at::empty({0}, at::kFloat), a_memory = at::empty({0}, at::kFloat);
  auto update = measure(task, split_in_float(pair.b, pair.scale, subspace.u, b_memory),
                        split_in_float(pair.a.t(), 1, subspace.v, a_memory));
  if (!fits_float(pair.scale) || !accurate_in_float(update.b, update.a, update.result.gains, update.norms2)) {
    update = measure(task, split_in_double(pair.b, pair.scale, subspace.u), split_in_double(pair.a.t(), 1, subspace.v));
  }
  auto& result = update.result;
  check(std::isfinite(result.norm) && std::isfinite(result.undo), task.label,
        ": the update or the subspace holds NaN, infinity or values too large");

  const int64_t r = task.pair.b.size(1);
  const int64_t rank = result_rank(options, result.gains, r);
  if (keep_everything(result.gains) && rank == r) {
    result.pair = stored(task.pair.b.to(at::kDouble).mul(task.pair.scale), task.pair.a, task);
  } else {  // for equal gains too: one factor alone, scaled, may round back to itself in float16
    const auto truncated = truncated_update(update.b, update.a, result.gains, rank);
    result.pair = stored(truncated.b, truncated.a, task);
    result.lost = truncated.lost;
  }
  return std::move(result);
}

}  // namespace

std::vector<Correction> correct(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  if (std::any_of(tasks.begin(), tasks.end(), attenuates_directions)) {
    return correct_with_directions(tasks, options);
  }
  if (any_on_device(tasks)) {
    std::for_each(tasks.begin(), tasks.end(), [&](const auto& task) { check_task(task, options); });
    return correct_on_device(tasks, options);
  }
  std::vector<Correction> results(tasks.size());
  for_each_in_parallel(tasks.size(), [&](size_t i) { results[i] = correct_one(tasks[i], options); });
  return results;
}

Correction correct(const CorrectionTask& task, const CorrectionOptions& options) {
  return std::move(correct(std::vector<CorrectionTask>{task}, options).front());
}

}  // namespace csulora
