#include "csulora/correction.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "check.h"
#include "factors.h"
#include "workers.h"

namespace csulora {
namespace {

using at::Tensor;

/// One factor of the update, split at its side's subspace: [inside, outside] = orthonormal triangle. All float64: an
/// update may lie in the subspace up to a millionth part, and that part may be all that is kept.
struct SplitFactor {
  Tensor coordinates;  // (k, r) basis^T factor
  Tensor inside;       // (m, r) basis basis^T factor
  Tensor outside;      // (m, r)
  Tensor orthonormal;  // (m, min(m, 2r))
  Tensor inside_root;  // (min(m, 2r), r), inside = orthonormal inside_root
  Tensor outside_root;
};

SplitFactor split(const Tensor& factor, const Tensor& basis) {
  const auto directions = basis.to(at::kDouble);           // (m, k)
  const auto coordinates = directions.t().matmul(factor);  // (k, r)
  const auto inside = directions.matmul(coordinates);      // (m, r)
  const auto outside = factor - inside;                    // (m, r)
  const auto [orthonormal, triangle] = at::linalg_qr(at::cat({inside, outside}, 1));
  const int64_t r = factor.size(1);
  return {coordinates, inside, outside, orthonormal, triangle.narrow(1, 0, r), triangle.narrow(1, r, r)};
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

bool gains_factor(const Gains& gains) { return gains.aligned * gains.off == gains.left * gains.right; }

/// The pair in float32, powers of two moved between each column of b and its row of a so that the largest entries of
/// both are about equal. The product stays as it is, and no factor is so small that rounding it to a narrow type
/// would undo the correction: entries of float16 near 2^-24 have a single bit.
LoraPair stored(const Tensor& b, const Tensor& a) {  // b (m, r), a (r, n)
  const auto exponent = [](const Tensor& largest) { return std::get<1>(at::frexp(largest)).to(at::kDouble); };
  const auto shift = exponent(a.abs().amax(1)).sub_(exponent(b.abs().amax(0))).div_(2).floor_();  // (r)
  const auto balanced_b = b.mul(shift.exp2());
  const auto balanced_a = a.mul(shift.neg().exp2().unsqueeze(1));
  return {balanced_b.to(at::kFloat).contiguous(), balanced_a.to(at::kFloat).contiguous()};
}

/// X as (row_in U U^T B + row_out (I - U U^T) B) (column_in A V V^T + column_out A (I - V V^T)), rank r.
LoraPair scaled_pair(const Tensor& b, const Tensor& a, const SplitFactor& b_split, const SplitFactor& a_split,
                     const Gains& gains) {
  const double grid[2][2] = {{gains.aligned, gains.left}, {gains.right, gains.off}};
  int row = 0;
  int column = 0;
  for (int i = 0; i < 4; ++i) {
    if (grid[i / 2][i % 2] > grid[row][column]) {
      row = i / 2;
      column = i % 2;
    }
  }
  const double pivot = grid[row][column];
  const double row_in = grid[0][column];
  const double row_out = grid[1][column];
  const double column_in = pivot == 0 ? 0 : grid[row][0] / pivot;
  const double column_out = pivot == 0 ? 0 : grid[row][1] / pivot;
  const auto combine = [](const Tensor& whole, const Tensor& inside, const Tensor& outside, double in, double out) {
    return in == out ? whole.mul(in) : inside.mul(in).add_(outside, out);  // the whole itself keeps `none` exact
  };
  return stored(combine(b, b_split.inside, b_split.outside, row_in, row_out),
                combine(a, a_split.inside.t(), a_split.outside.t(), column_in, column_out));
}

/// X whole: [U C_U, B_out] M [C_V V^T; A_out], rank 2r.
LoraPair doubled_pair(const SplitFactor& b, const SplitFactor& a, const Gains& gains) {
  const auto first = b.inside.mul(gains.aligned).add_(b.outside, gains.right);
  const auto second = b.inside.mul(gains.left).add_(b.outside, gains.off);
  return stored(at::cat({first, second}, 1), at::cat({a.inside, a.outside}, 1).t());
}

struct Truncated {
  LoraPair pair;
  double lost = 0;
};

/// Best approximation of X of rank `rank`, from the SVD of its 2r x 2r core; the factors share each singular value.
Truncated truncated_pair(const SplitFactor& b, const SplitFactor& a, const Gains& gains, int64_t rank) {
  const auto weighted_in = a.inside_root.mul(gains.aligned).add_(a.outside_root, gains.left);
  const auto weighted_out = a.inside_root.mul(gains.right).add_(a.outside_root, gains.off);
  const auto core = b.inside_root.matmul(weighted_in.t()).addmm_(b.outside_root, weighted_out.t());
  const auto [left, values, right] = at::linalg_svd(core, false);

  const int64_t nonzero = std::min(rank, values.size(0));  // fewer than r where r exceeds a side of the matrix
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
  check(u.size(0) == b.size(0) && v.size(0) == a.size(1), task.label, ": the update is ", b.size(0), " x ", a.size(1),
        " and the subspace is for ", u.size(0), " x ", v.size(0));
  check(options.rule != RankRule::fixed || options.rank >= 1, "rank is ", options.rank, "; it must be at least 1");
  check_attenuation(task);
}

int64_t rank_cap(const CorrectionOptions& options, int64_t rank) {
  switch (options.rule) {
    case RankRule::keep:
      return rank;
    case RankRule::fixed:
      return std::min(options.rank, 2 * rank);
    case RankRule::exact:
      return 2 * rank;
  }
  throw InternalError("unknown rank rule");
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
  result.norm = std::sqrt(total);
  // An update that float32 cannot hold is infinite in its host.
  check(std::isfinite(static_cast<float>(result.norm)) && std::isfinite(result.undo), task.label,
        ": the update or the subspace holds NaN, infinity or values too large");
  if (total > 0) {
    result.energies = {norms2.aligned / total, norms2.left / total, norms2.right / total, norms2.off / total};
  }
  result.gains = gains_for(task.attenuation, result.energies);
  result.change = changed_share(result.gains, result.energies);

  const int64_t rank = b.size(1);
  const int64_t cap = rank_cap(options, rank);
  if (gains_factor(result.gains) && cap >= rank) {
    result.pair = scaled_pair(b, a, b_split, a_split, result.gains);
  } else if (cap == 2 * rank) {
    result.pair = doubled_pair(b_split, a_split, result.gains);
  } else {
    auto truncated = truncated_pair(b_split, a_split, result.gains, cap);
    result.pair = std::move(truncated.pair);
    result.lost = truncated.lost;
  }
  check_finite(result.pair, task.label);
  return result;
}

}  // namespace

std::vector<Correction> correct(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  std::vector<Correction> results(tasks.size());
  for_each_in_parallel(tasks.size(), [&](size_t i) { results[i] = correct_one(tasks[i], options); });
  return results;
}

Correction correct(const CorrectionTask& task, const CorrectionOptions& options) {
  return std::move(correct(std::vector<CorrectionTask>{task}, options).front());
}

}  // namespace csulora
