#include <algorithm>
#include <vector>

#include "correct/gains.h"
#include "correct/gram_sides.h"
#include "correct/measurement.h"
#include "correct/task_check.h"
#include "correct/thin.h"
#include "csulora/correct.h"
#include "gpu/placement.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

Energy energy_of(const CorrectionTask& task, int64_t directions) {
  const auto& factors = task.factors;
  const auto [b, a, measures] =
      measured(is_wide(factors) ? thinned(factors) : factors, task.subspace, kEverything, task.label);
  const int64_t known = std::min(directions, task.subspace.s.size(0));
  return energy(b, a, known, known);
}

}  // namespace

double energy_along(const std::vector<CorrectionTask>& tasks, int64_t directions) {
  check(directions >= 0, "the number of directions is ", directions, "; it must be 0 or more");
  check_tasks(tasks, {});
  std::vector<Energy> energies(tasks.size());
  for_each(tasks.size(), any_on_device(tasks), [&](size_t i) {
    const TorchGuards torch_guards;
    energies[i] = energy_of(tasks[i], directions);
  });
  Energy sum;
  for (const auto& energy : energies) {
    sum += energy;
  }
  return sum.all > 0 ? sum.along / sum.all : 0;
}

}  // namespace csulora
