#include "csulora/correction.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>

#include "check.h"

namespace csulora {
namespace {

using at::Tensor;

/// One factor of the update split at one side's subspace: factor = inside + outside.
struct SplitFactor {
  Tensor coordinates;   // (k, r) float32, basis^T factor
  Tensor inside;        // (m, r) float32, basis basis^T factor
  Tensor outside;       // (m, r) float32
  Tensor inside_gram;   // (r, r) float64
  Tensor outside_gram;  // (r, r) float64
};

Tensor gram(const Tensor& factor) {
  const auto wide = factor.to(at::kDouble);
  return wide.t().matmul(wide);
}

SplitFactor split(const Tensor& factor, const Tensor& basis) {
  const auto directions = basis.to(at::kFloat);            // (m, k)
  const auto coordinates = directions.t().matmul(factor);  // (k, r)
  const auto inside = directions.matmul(coordinates);      // (m, r)
  const auto outside = factor - inside;                    // (m, r)
  return {coordinates, inside, outside, gram(inside), gram(outside)};
}

double trace_of_product(const Tensor& left, const Tensor& right) {  // both (r, r), symmetric
  return left.mul(right).sum().item<double>();
}

/// Squared Frobenius norms of the four parts, as traces of r x r products.
Parts part_norms2(const SplitFactor& b, const SplitFactor& a) {
  const auto norm2 = [](const Tensor& left, const Tensor& right) {
    const double trace = trace_of_product(left, right);
    return trace < 0 ? 0 : trace;  // rounding; NaN passes, to be found by the caller
  };
  return {norm2(b.inside_gram, a.inside_gram), norm2(b.inside_gram, a.outside_gram),
          norm2(b.outside_gram, a.inside_gram), norm2(b.outside_gram, a.outside_gram)};
}

double undo(const SplitFactor& b, const SplitFactor& a, const Tensor& singular_values) {
  const auto s = singular_values.to(at::kDouble);
  const double alignment2 = s.square().sum().item<double>();
  if (alignment2 == 0) {
    return 0;
  }
  const auto diagonal = b.coordinates.to(at::kDouble).mul(a.coordinates.to(at::kDouble)).sum(1);  // (k)
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
  // Adding the inside to a multiple of the whole keeps `none` exact: its difference of gains is 0.
  const auto corrected_b = b.mul(row_out).add_(b_split.inside, row_in - row_out);
  const auto corrected_a = a.mul(column_out).add_(a_split.inside.t(), column_in - column_out);
  return {corrected_b, corrected_a};
}

/// X whole: [U C_U, B_out] M [C_V V^T; A_out], rank 2r.
LoraPair doubled_pair(const SplitFactor& b, const SplitFactor& a, const Gains& gains) {
  const auto first = b.inside.mul(gains.aligned).add_(b.outside, gains.right);
  const auto second = b.inside.mul(gains.left).add_(b.outside, gains.off);
  return {at::cat({first, second}, 1), at::cat({a.inside, a.outside}, 1).t().contiguous()};
}

/// A square root R of a Gram matrix, R^T R = gram, and the matrix that undoes it on the gram's range.
struct GramRoot {
  Tensor root;     // (r, r) float64
  Tensor inverse;  // (r, r) float64, root inverse = projector on the range
};

GramRoot gram_root(const Tensor& gram_matrix) {
  const auto [values, vectors] = at::linalg_eigh(gram_matrix);
  const auto roots = values.clamp_min(0).sqrt();
  // Directions this small are float32 rounding of the others; dividing by them would only amplify it.
  const double cutoff = roots.max().item<double>() * std::numeric_limits<float>::epsilon();
  const auto inverse_roots = at::where(roots > cutoff, roots.reciprocal(), at::zeros_like(roots));
  return {roots.unsqueeze(1).mul(vectors.t()), vectors.mul(inverse_roots)};
}

struct Truncated {
  LoraPair pair;
  double lost = 0;
};

/// Best approximation of X of at most `rank`, from the SVD of its 2r x 2r core; the factors share each singular value.
Truncated truncated_pair(const SplitFactor& b, const SplitFactor& a, const Gains& gains, int64_t rank) {
  const auto b_in = gram_root(b.inside_gram);
  const auto b_out = gram_root(b.outside_gram);
  const auto a_in = gram_root(a.inside_gram);
  const auto a_out = gram_root(a.outside_gram);
  const auto upper = at::cat(
      {b_in.root.matmul(a_in.root.t()).mul_(gains.aligned), b_in.root.matmul(a_out.root.t()).mul_(gains.left)}, 1);
  const auto lower = at::cat(
      {b_out.root.matmul(a_in.root.t()).mul_(gains.right), b_out.root.matmul(a_out.root.t()).mul_(gains.off)}, 1);
  const auto [left, values, right] = at::linalg_svd(at::cat({upper, lower}, 0), false);  // (2r, 2r)

  const int64_t r = b.inside_gram.size(0);
  const auto shared = values.narrow(0, 0, rank).sqrt();
  const auto rebuild = [&](const SplitFactor& factor, const GramRoot& in, const GramRoot& out,
                           const Tensor& vectors) {  // vectors (2r, rank)
    const auto mix_in = in.inverse.matmul(vectors.narrow(0, 0, r)).mul_(shared).to(at::kFloat);
    const auto mix_out = out.inverse.matmul(vectors.narrow(0, r, r)).mul_(shared).to(at::kFloat);
    return factor.inside.matmul(mix_in).addmm_(factor.outside, mix_out);  // (m, rank)
  };
  const auto corrected_b = rebuild(b, b_in, b_out, left.narrow(1, 0, rank));
  const auto corrected_a = rebuild(a, a_in, a_out, right.t().narrow(1, 0, rank)).t().contiguous();

  const auto energies = values.square();
  const double total = energies.sum().item<double>();
  const double dropped = energies.narrow(0, rank, energies.size(0) - rank).sum().item<double>();
  return {{corrected_b, corrected_a}, total == 0 ? 0 : dropped / total};
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
  const auto& subspace = task.subspace;
  check_matrix(b, task.label + ": b");
  check_matrix(a, task.label + ": a");
  check_matrix(subspace.u, task.label + ": u");
  check_matrix(subspace.v, task.label + ": v");
  check(b.size(1) == a.size(0) && b.size(1) >= 1, task.label, ": b is ", b.sizes(), " and a is ", a.sizes(),
        "; their inner dimensions must be equal and at least 1");
  check(std::isfinite(scale), task.label, ": the scale is not finite");
  check(subspace.u.size(0) == b.size(0) && subspace.v.size(0) == a.size(1), task.label, ": the update is ", b.size(0),
        " x ", a.size(1), " and the subspace is for ", subspace.u.size(0), " x ", subspace.v.size(0));
  check(subspace.s.defined() && subspace.s.dim() == 1 && subspace.s.size(0) == subspace.u.size(1) &&
            subspace.u.size(1) == subspace.v.size(1),
        task.label, ": u, s and v of the subspace disagree on k");
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

Correction correct_one(const CorrectionTask& task, const CorrectionOptions& options) {
  check_task(task, options);
  const c10::NoGradGuard no_grad;
  const auto b = task.pair.b.to(at::kFloat).mul(task.pair.scale);  // (m, r)
  const auto a = task.pair.a.to(at::kFloat);                       // (r, n)
  const auto b_split = split(b, task.subspace.u);
  const auto a_split = split(a.t(), task.subspace.v);

  const auto norms2 = part_norms2(b_split, a_split);
  const double total = norms2.aligned + norms2.left + norms2.right + norms2.off;
  check(std::isfinite(total), task.label, ": the update or the subspace holds NaN, infinity or values too large");

  Correction result;
  if (total > 0) {
    result.energies = {norms2.aligned / total, norms2.left / total, norms2.right / total, norms2.off / total};
  }
  const auto& energies = result.energies;
  result.gains = gains_for(task.attenuation, energies);
  result.norm = std::sqrt(total);
  const auto& gains = result.gains;
  const auto removed = [](double g, double energy) { return (1 - g) * (1 - g) * energy; };
  result.change = std::sqrt(removed(gains.aligned, energies.aligned) + removed(gains.left, energies.left) +
                            removed(gains.right, energies.right) + removed(gains.off, energies.off));
  result.undo = undo(b_split, a_split, task.subspace.s);

  const int64_t rank = b.size(1);
  const int64_t cap = rank_cap(options, rank);
  if (gains_factor(gains) && cap >= rank) {
    result.pair = scaled_pair(b, a, b_split, a_split, gains);
  } else if (cap == 2 * rank) {
    result.pair = doubled_pair(b_split, a_split, gains);
  } else {
    auto truncated = truncated_pair(b_split, a_split, gains, cap);
    result.pair = std::move(truncated.pair);
    result.lost = truncated.lost;
  }
  check_finite(result.pair, task.label);
  return result;
}

}  // namespace

std::vector<Correction> correct(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  std::vector<Correction> results(tasks.size());
  std::vector<std::exception_ptr> errors(tasks.size());
  std::atomic<size_t> next{0};
  // At least two workers, so that even a single module runs inside a parallel region, where every product uses one
  // thread: the bits then depend neither on the number of modules nor on the number of threads.
  const int64_t workers = std::max(2, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) {
      try {
        results[i] = correct_one(tasks[i], options);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  });
  // The first in the caller's order, whichever thread failed first.
  for (const auto& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
  return results;
}

Correction correct(const CorrectionTask& task, const CorrectionOptions& options) {
  return std::move(correct(std::vector<CorrectionTask>{task}, options).front());
}

}  // namespace csulora
