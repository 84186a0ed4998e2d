#include "csulora/correct.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "correct/directions.h"
#include "correct/gains.h"
#include "correct/half_precision.h"
#include "correct/measurement.h"
#include "correct/result_rank.h"
#include "correct/storage.h"
#include "correct/task_check.h"
#include "correct/thin.h"
#include "correct/truncation.h"
#include "correct/undo.h"
#include "gpu/correction_device.h"
#include "gpu/placement.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

Correction correct_one(const CorrectionTask& task, const CorrectionOptions& options) {
  const TorchGuards torch_guards;
  if (auto result = correct_half_precision(task, options)) {
    return std::move(*result);
  }
  auto update = measured(task);
  auto& result = update.result;

  const auto& [b, a, scale] = task.factors;
  const int64_t r = b.size(1), exact = exact_rank(result.gains, r, std::min(b.size(0), a.size(1)));
  const int64_t rank = result_rank(options, exact, r);
  result.undo_after = result.gains.aligned * result.undo;
  if (keeps_everything(result.gains) && rank == r) {
    result.factors = stored(b.to(at::kDouble).mul(scale), a, task);
  } else {  // for equal gains too: one factor alone, scaled, may round back to itself in float16
    const auto truncated = truncated_update(update.b, update.a, result.gains, rank);
    result.factors = stored(truncated.b, truncated.a, task);
    result.truncation_error = truncated.truncation_error;
    if (rank < exact) {
      result.undo_after = undo(truncated.b_coordinates, truncated.a_coordinates, task.subspace.s);
    }
  }
  return std::move(result);
}

/// correct() for tasks of which none is along directions.
std::vector<Correction> correct_components(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  if (any_on_device(tasks)) {
    return correct_on_device(tasks, options);
  }
  std::vector<Correction> results(tasks.size());
  for_each_in_parallel(tasks.size(), [&](size_t i) { results[i] = correct_one(tasks[i], options); });
  return results;
}

/// correct() for checked tasks of which none is wide.
std::vector<Correction> correct_thin(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  std::vector<CorrectionTask> along, others;
  for (const auto& task : tasks) {
    (attenuates_directions(task) ? along : others).push_back(task);
  }
  auto along_results = along.empty() ? std::vector<Correction>{} : correct_along(along, options);
  auto other_results = others.empty() ? std::vector<Correction>{} : correct_components(others, options);
  auto next_along = along_results.begin(), next_other = other_results.begin();
  std::vector<Correction> results;
  for (const auto& task : tasks) {
    results.push_back(std::move(attenuates_directions(task) ? *next_along++ : *next_other++));
  }
  return results;
}

}  // namespace

std::vector<Correction> correct(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  check_tasks(tasks, options);
  if (std::none_of(tasks.begin(), tasks.end(), [](const CorrectionTask& task) { return is_wide(task.factors); })) {
    return correct_thin(tasks, options);
  }
  auto thin = tasks;
  for_each(tasks.size(), any_on_device(tasks), [&](size_t i) {
    const TorchGuards torch_guards;
    if (is_wide(tasks[i].factors)) {
      thin[i].factors = thinned(tasks[i].factors);
    }
  });
  auto results = correct_thin(thin, options);
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (is_wide(tasks[i].factors)) {
      results[i].factors = stored(results[i].factors.b, results[i].factors.a, tasks[i]);
    }
  }
  return results;
}

Correction correct(const CorrectionTask& task, const CorrectionOptions& options) {
  return std::move(correct(std::vector<CorrectionTask>{task}, options).front());
}

}  // namespace csulora
