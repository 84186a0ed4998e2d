#include "correct/task_check.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <variant>

#include "runtime/check.h"
#include "subspace_check.h"

namespace csulora {
namespace {

void check_share(double value, const char* component, const std::string& label) {
  check(value >= 0 && value <= 1, label, ": gain `", component, "` is ", value, "; it must lie in [0, 1]");
}

void check_penalty(double value, const char* component, const std::string& label) {
  check(value >= 0, label, ": penalty `", component, "` is ", value,
        "; it must be 0 or more (infinity removes the component)");
}

void check_directions(const Directions& directions, int64_t known, const std::string& label) {
  const auto& [left, right, reinforced] = directions;
  const auto check_count = [&](const std::vector<double>& numbers, const char* name) {
    const auto count = static_cast<int64_t>(numbers.size());
    check(count <= known, label, ": the policy has numbers for ", count, " ", name,
          " directions, and the subspace file has ", known, "; use the one that the policy is for");
  };
  check_count(left, "left");
  check_count(right, "right");
  check_count(reinforced, "reinforced");
  for (const auto* gains : {&left, &right}) {
    check(std::all_of(gains->begin(), gains->end(), [](double gain) { return gain >= 0 && gain <= 1; }), label,
          ": a gain of a direction does not lie in [0, 1]");
  }
  check(std::all_of(reinforced.begin(), reinforced.end(), [](double multiple) { return std::isfinite(multiple); }),
        label, ": a multiple of a direction is not finite");
}

void check_attenuation(const CorrectionTask& task) {
  if (const auto* directions = std::get_if<Directions>(&task.attenuation)) {
    check_directions(*directions, task.subspace.s.size(0), task.label);
  } else if (const auto* gains = std::get_if<Gains>(&task.attenuation)) {
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

void check_input_filter(const CorrectionTask& task) {
  const auto& [p, q] = *task.input_filter;
  check_matrix(p, task.label + ": the input filter's p");
  check_matrix(q, task.label + ": the input filter's q");
  check(p.scalar_type() == at::kFloat && q.scalar_type() == at::kFloat, task.label,
        ": the input filter is not float32");
  check(p.sizes() == q.sizes() && p.size(0) == task.factors.a.size(1), task.label, ": the update has ",
        task.factors.a.size(1), " inputs, the input filter's p is ", p.sizes(), " and its q ", q.sizes());
  check_same_device(p, task.factors.b, task.label + ": the input filter's p");
  check_same_device(q, task.factors.b, task.label + ": the input filter's q");
  check(std::holds_alternative<Directions>(task.attenuation), task.label,
        ": only gains of directions can be filtered; give such gains for this module, or set filtered = false in the "
        "policy");
}

void check_options(const CorrectionOptions& options) {
  check(options.rule != RankRule::fixed || options.rank >= 1, "rank is ", options.rank, "; it must be at least 1");
  const double reference = options.reference_energy.value_or(1);
  check(reference > 0 && reference <= 1, "reference_energy is ", reference, "; it must lie in (0, 1]");
}

void check_task(const CorrectionTask& task) {
  const auto& [b, a, scale] = task.factors;
  const auto& [u, s, v, certificate] = task.subspace;
  check_matrix(b, task.label + ": b");
  check_matrix(a, task.label + ": a");
  check(b.size(1) == a.size(0) && b.numel() > 0 && a.numel() > 0, task.label, ": b is ", b.sizes(), " and a is ",
        a.sizes(), "; their inner dimensions must be equal, and every dimension at least 1");
  check(std::isfinite(scale), task.label, ": the scale is not finite");
  check_factors(task.subspace, task.label + ": the subspace's ");
  check_same_device(a, b, task.label + ": a");
  check_same_device(u, b, task.label + ": the subspace's u");
  check(u.size(0) == b.size(0) && v.size(0) == a.size(1), task.label, ": the update is ", b.size(0), " x ", a.size(1),
        " and the subspace is for ", u.size(0), " x ", v.size(0));
  check_attenuation(task);
  if (task.input_filter) {
    check_input_filter(task);
  }
}

}  // namespace

void check_tasks(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  check_options(options);
  std::for_each(tasks.begin(), tasks.end(), check_task);
}

}  // namespace csulora
