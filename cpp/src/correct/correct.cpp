#include "csulora/correct.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "correct/directions.h"
#include "correct/measurement.h"
#include "correct/result_rank.h"
#include "correct/storage.h"
#include "correct/task_check.h"
#include "correct/truncation.h"
#include "gpu/correction_device.h"
#include "runtime/modes.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

bool keep_everything(const Gains& gains) {
  return gains.aligned == 1 && gains.left == 1 && gains.right == 1 && gains.off == 1;
}

Correction correct_one(const CorrectionTask& task, const CorrectionOptions& options) {
  const WithoutModes without_modes;
  auto update = measured(task);
  auto& result = update.result;

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
  check_tasks(tasks, options);
  if (std::any_of(tasks.begin(), tasks.end(), attenuates_directions)) {
    return correct_with_directions(tasks, options);
  }
  if (any_on_device(tasks)) {
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
