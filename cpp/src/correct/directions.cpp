#include "correct/directions.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>

#include "correct/filtered.h"
#include "correct/gains.h"
#include "correct/gram_sides.h"
#include "correct/measurement.h"
#include "correct/result_rank.h"
#include "correct/storage.h"
#include "correct/truncation.h"
#include "correct/undo.h"
#include "gpu/placement.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

using at::Tensor;

/// |X_c| / |dW_c| for every component, from their squares.
Gains applied(const Components& to, const Components& from, double most) {
  const auto gain = [&](double kept, double norm2) { return norm2 > 0 ? std::min(most, std::sqrt(kept / norm2)) : 1; };
  return {gain(to.aligned, from.aligned), gain(to.left, from.left), gain(to.right, from.right), gain(to.off, from.off)};
}

/// A task's update as measured, before anything is done to it.
struct Update {
  GramSides sides;
  Energy energy;
  Correction result;
  bool in_float;
};

/// Whether the host lets torch make float32 products of shorter numbers, which CPUs with units for those then do.
bool rounds_products() {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::BF16 || precision == at::Float32Precision::TF32;
}

Update measured_update(const CorrectionTask& task) {
  const auto& [left, right, reinforced] = std::get<Directions>(task.attenuation);
  auto [b, a, result] = measured(task);
  return {{gram_side(b), gram_side(a)},
          energy(b, a, static_cast<int64_t>(left.size()), static_cast<int64_t>(right.size())),
          std::move(result),
          b.columns.scalar_type() == at::kFloat && !rounds_products()};
}

/// By how much the penalties of an adapter's updates are multiplied.
double penalty_scale_of(const std::vector<Update>& updates, const CorrectionOptions& options) {
  Energy sum;
  for (const auto& update : updates) {
    sum += update.energy;
  }
  if (!options.reference_energy || sum.all <= 0) {
    return 1;
  }
  return penalty_scale(sum.along / sum.all, *options.reference_energy);
}

/// (I - basis (1 - gains) basis^T) factor, for a factor (m, r) and the first columns of a basis (m, k).
Tensor attenuated(const Tensor& factor, const Tensor& basis, const std::vector<double>& gains) {
  const auto columns = widened(basis.narrow(1, 0, static_cast<int64_t>(gains.size())), factor.scalar_type());
  const auto removed = 1 - at::tensor(gains, columns.options());
  return factor.addmm(columns, columns.t().mm(factor).mul_(removed.unsqueeze(1)), 1, -1);
}

/// X for the gains that a task's directions got, of a rank that is greater by what is added. The columns of b are as
/// long as the rows of a, so that no storage type has too few digits for one of them alone.
LoraFactors factors_of(const CorrectionTask& task, const Directions& directions, const GramSides& x,
                       at::ScalarType dtype) {
  const auto& subspace = task.subspace;
  const auto stretch = at::tensor(stretches(x), subspace.u.options().dtype(at::kDouble));
  const auto wide_b = widened(task.factors.b, dtype).mul(stretch.mul(task.factors.scale).to(dtype));
  const auto wide_a = widened(task.factors.a, dtype).div(stretch.unsqueeze(1).to(dtype));
  const auto b = attenuated(wide_b, subspace.u, directions.left);
  const auto a = attenuated(wide_a.t(), subspace.v, directions.right).t();
  const auto multiples = at::tensor(directions.reinforced, b.options());
  const auto chosen = multiples.nonzero().flatten();
  if (chosen.size(0) == 0) {
    return {b, a};
  }
  const auto of_chosen = [&](const Tensor& factor) { return widened(factor.index_select(-1, chosen), dtype); };
  const auto added = of_chosen(subspace.s).mul_(multiples.index_select(0, chosen)), lengths = added.abs().sqrt_();
  return {at::cat({b, of_chosen(subspace.u).mul_(added.sign().mul_(lengths))}, 1),
          at::cat({a, of_chosen(subspace.v).mul_(lengths).t()}, 0)};
}

/// X in float32 or float64, of some rank, and what was measured of it.
struct Target {
  LoraFactors factors;
  Gains gains;
  double distance = 0;  ///< |X - dW|
  double undo = 0;      ///< of X
  bool rounds_well;     ///< whether rounding its factors costs what rounding X would
};

Target on_all_inputs(const CorrectionTask& task, const Directions& directions, const Update& update) {
  const auto& [sides, energy, result, in_float] = update;
  GramSides x{attenuated(sides.b, directions.left), attenuated(sides.a, directions.right), directions.reinforced};
  const SmallMatrix singular(task.subspace.s.unsqueeze(0));
  std::transform(x.added.begin(), x.added.end(), singular[0], x.added.begin(), std::multiplies<double>());
  const double most = x.added.empty() ? 1 : std::numeric_limits<double>::infinity();
  const auto dtype = in_float && accurate_in_float(x, sides) ? at::kFloat : at::kDouble;
  return {factors_of(task, directions, x, dtype), applied(norms2(x), norms2(sides), most), distance(x, sides),
          undo(x.b.coordinates, x.a.coordinates, task.subspace.s, x.added), rounds_well(x)};
}

Target on_filtered_inputs(const CorrectionTask& task, const Directions& directions, const Update& update) {
  const auto x = filtered(task, directions, update.sides, update.in_float ? at::kFloat : at::kDouble);
  const auto gains = applied(norms2(x.sides), norms2(update.sides), std::numeric_limits<double>::infinity());
  const double undo_after = undo(x.sides.b.coordinates, x.sides.a.coordinates, task.subspace.s);
  return {{x.b, x.a}, gains, x.distance, undo_after, rounds_well(x.sides)};
}

/// Completes what was measured.
void complete(const CorrectionTask& task, double penalty_scale, const CorrectionOptions& options, Update& update) {
  auto directions = std::get<Directions>(task.attenuation);
  directions.left = with_scaled_penalties(directions.left, penalty_scale);
  directions.right = with_scaled_penalties(directions.right, penalty_scale);
  auto& result = update.result;
  if (result.norm == 0) {
    directions.reinforced.clear();
  }
  auto [factors, gains, distance, undo_after, rounds_well] =
      (task.input_filter ? on_filtered_inputs : on_all_inputs)(task, directions, update);
  result.gains = gains;
  result.undo_after = undo_after;
  result.relative_change = result.norm > 0 ? distance / result.norm : 0;
  check(std::isfinite(result.relative_change) && std::isfinite(total(gains)), task.label,
        ": the update is too small to be measured beside what the policy reinforces");

  const auto& reinforced = directions.reinforced;
  const auto added = static_cast<int64_t>(reinforced.size()) - std::count(reinforced.begin(), reinforced.end(), 0);
  const int64_t exact = factors.a.size(0), rank = result_rank(options, exact, task.factors.a.size(0) + added);
  if (rank < exact || !rounds_well) {
    const auto x = truncated(factors, task.subspace, rank, task.label);
    factors = {x.b, x.a};
    result.truncation_error = x.truncation_error;
    result.undo_after = undo(x.b_coordinates, x.a_coordinates, task.subspace.s);
  }
  result.factors = stored(factors.b, factors.a, task);
}

template <typename Work>
void for_each_task(const std::vector<CorrectionTask>& tasks, Work work) {
  for_each(tasks.size(), any_on_device(tasks), [&](size_t i) {
    const TorchGuards torch_guards;
    work(i);
  });
}

}  // namespace

bool attenuates_directions(const CorrectionTask& task) { return std::holds_alternative<Directions>(task.attenuation); }

std::vector<Correction> correct_along(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  std::vector<Update> updates(tasks.size());
  for_each_task(tasks, [&](size_t i) { updates[i] = measured_update(tasks[i]); });
  const double multiplier = penalty_scale_of(updates, options);
  for_each_task(tasks, [&](size_t i) { complete(tasks[i], multiplier, options, updates[i]); });
  std::vector<Correction> results;
  std::transform(updates.begin(), updates.end(), std::back_inserter(results),
                 [](Update& update) { return std::move(update.result); });
  return results;
}

}  // namespace csulora
