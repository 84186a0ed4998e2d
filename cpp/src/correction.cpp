#include "csulora/correction.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "check.h"
#include "correction_device.h"
#include "factors.h"
#include "result_rank.h"
#include "workers.h"

namespace csulora {
namespace {

using at::Tensor;

/// One factor of the update, split at its side's subspace, as [inside, outside] = orthonormal [inside_root,
/// outside_root]. All float64: all but a millionth of an update may lie inside, and that millionth be what is kept.
struct SplitFactor {
  Tensor coordinates;   // (k, r) basis^T factor
  Tensor orthonormal;   // (m, j) with j = min(m, 2r)
  Tensor inside_root;   // (j, r) of basis basis^T factor
  Tensor outside_root;  // (j, r) of the rest
};

SplitFactor split(const Tensor& factor, const Tensor& basis) {
  const auto directions = basis.to(at::kFloat).to(at::kDouble);  // (m, k); at once, float16 takes five times as long
  const auto coordinates = directions.t().matmul(factor);        // (k, r)
  const auto inside = directions.matmul(coordinates);            // (m, r)
  const auto [orthonormal, roots] = at::linalg_qr(at::cat({inside, factor - inside}, 1));
  const int64_t r = factor.size(1);
  return {coordinates, orthonormal, roots.narrow(1, 0, r), roots.narrow(1, r, r)};
}

/// Squared Frobenius norms of the four parts.
Parts part_norms2(const SplitFactor& b, const SplitFactor& a) {
  const auto norm2 = [](const Tensor& left, const Tensor& right) {
    return left.matmul(right.t()).square().sum().item<double>();
  };
  return {norm2(b.inside_root, a.inside_root), norm2(b.inside_root, a.outside_root),
          norm2(b.outside_root, a.inside_root), norm2(b.outside_root, a.outside_root)};
}

double undo(const SplitFactor& b, const SplitFactor& a, const Tensor& singular_values) {
  const auto s = singular_values.to(at::kDouble);
  const double alignment2 = s.square().sum().item<double>();
  if (alignment2 == 0) {
    return 0;
  }
  const auto diagonal = b.coordinates.mul(a.coordinates).sum(1);  // (k)
  return -s.mul(diagonal).sum().item<double>() / alignment2;
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

LoraPair stored(const Tensor& b, const Tensor& a) {
  return {b.to(at::kFloat).contiguous(), a.to(at::kFloat).contiguous()};
}

struct Truncated {
  LoraPair pair;
  double lost = 0;
};

/// X = [B_in, B_out] [[aligned, left], [right, off]] [A_in; A_out] or its best approximation of rank `rank`, from the
/// SVD of its 2r x 2r core. The factors share each singular value, so that rounding them costs what rounding X would.
Truncated truncated_pair(const SplitFactor& b, const SplitFactor& a, const Gains& gains, int64_t rank) {
  const auto weighted_in = a.inside_root.mul(gains.aligned).add_(a.outside_root, gains.left);
  const auto weighted_out = a.inside_root.mul(gains.right).add_(a.outside_root, gains.off);
  const auto core = b.inside_root.matmul(weighted_in.t()).addmm_(b.outside_root, weighted_out.t());
  const auto [left, values, right] = at::linalg_svd(core, false);

  const int64_t nonzero = std::min(rank, values.size(0));  // fewer than `rank` where that exceeds a side of the matrix
  const auto shared = values.narrow(0, 0, nonzero).sqrt();
  const auto factor = [&](const Tensor& orthonormal, const Tensor& vectors) {
    const auto leading = orthonormal.matmul(vectors.narrow(1, 0, nonzero).mul(shared));
    return at::constant_pad_nd(leading, {0, rank - nonzero});  // (m, rank)
  };
  const auto energies = values.square();
  const double total = energies.sum().item<double>();
  const double dropped = energies.narrow(0, nonzero, values.size(0) - nonzero).sum().item<double>();
  return {stored(factor(b.orthonormal, left), factor(a.orthonormal, right.t()).t()), total == 0 ? 0 : dropped / total};
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

void check_finite(const LoraPair& pair, const std::string& label) {
  const bool finite = pair.b.isfinite().all().item<bool>() && pair.a.isfinite().all().item<bool>();
  check(finite, label, ": the corrected update is not finite; the adapter's or the pack's values are too large");
}

double changed_share(const Gains& gains, const Parts& energies) {
  const auto removed = [](double g, double energy) { return (1 - g) * (1 - g) * energy; };
  return std::sqrt(removed(gains.aligned, energies.aligned) + removed(gains.left, energies.left) +
                   removed(gains.right, energies.right) + removed(gains.off, energies.off));
}

Correction correct_one(const CorrectionTask& task, const CorrectionOptions& options) {
  check_task(task, options);
  const c10::NoGradGuard no_grad;
  const auto b = task.pair.b.to(at::kDouble).mul(task.pair.scale);  // (m, r)
  const auto a = task.pair.a.to(at::kDouble);                       // (r, n)
  const auto b_split = split(b, task.subspace.u);
  const auto a_split = split(a.t(), task.subspace.v);

  Correction result;
  const auto norms2 = part_norms2(b_split, a_split);
  const double total = norms2.aligned + norms2.left + norms2.right + norms2.off;
  result.undo = undo(b_split, a_split, task.subspace.s);
  check(std::isfinite(total) && std::isfinite(result.undo), task.label,
        ": the update or the subspace holds NaN, infinity or values too large");
  if (total > 0) {
    result.energies = {norms2.aligned / total, norms2.left / total, norms2.right / total, norms2.off / total};
  }
  result.norm = std::sqrt(total);
  result.gains = gains_for(task.attenuation, result.energies);
  result.change = changed_share(result.gains, result.energies);

  const int64_t rank = result_rank(options, result.gains, b.size(1));
  if (keep_everything(result.gains) && rank == b.size(1)) {
    result.pair = stored(b, a);
  } else {  // for equal gains too: one factor alone, scaled, may round back to itself in float16
    auto truncated = truncated_pair(b_split, a_split, result.gains, rank);
    result.pair = std::move(truncated.pair);
    result.lost = truncated.lost;
  }
  check_finite(result.pair, task.label);
  return result;
}

}  // namespace

std::vector<Correction> correct(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
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
