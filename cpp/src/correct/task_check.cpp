#include "correct/task_check.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <variant>

#include "factors.h"
#include "runtime/check.h"

namespace csulora {
namespace {

void check_share(double value, const char* part, const std::string& label) {
  check(value >= 0 && value <= 1, label, ": gain `", part, "` is ", value, "; it must lie in [0, 1]");
}

void check_penalty(double value, const char* part, const std::string& label) {
  check(value >= 0, label, ": penalty `", part, "` is ", value, "; it must be 0 or more (infinity removes the part)");
}

void check_directions(const Directions& directions, int64_t known, const std::string& label) {
  const auto& [left, right, restored] = directions;
  const auto check_count = [&](const std::vector<double>& numbers, const char* name) {
    const auto count = static_cast<int64_t>(numbers.size());
    check(count <= known, label, ": the policy has numbers for ", count, " ", name, " directions, and the pack has ",
          known, "; use the pack that the policy is for");
  };
  check_count(left, "left");
  check_count(right, "right");
  check_count(restored, "restored");
  for (const auto* gains : {&left, &right}) {
    check(std::all_of(gains->begin(), gains->end(), [](double gain) { return gain >= 0 && gain <= 1; }), label,
          ": a gain of a direction does not lie in [0, 1]");
  }
  check(std::all_of(restored.begin(), restored.end(), [](double multiple) { return std::isfinite(multiple); }), label,
        ": a multiple of a direction is not finite");
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

void check_scope(const CorrectionTask& task) {
  const auto& [p, q] = *task.scope;
  check_matrix(p, task.label + ": the scope's p");
  check_matrix(q, task.label + ": the scope's q");
  check(p.scalar_type() == at::kFloat && q.scalar_type() == at::kFloat, task.label, ": the scope is not float32");
  check(p.sizes() == q.sizes() && p.size(0) == task.pair.a.size(1), task.label, ": the update has ",
        task.pair.a.size(1), " inputs, the scope's p is ", p.sizes(), " and its q ", q.sizes());
  check_same_device(p, task.pair.b, task.label + ": the scope's p");
  check_same_device(q, task.pair.b, task.label + ": the scope's q");
  check(std::holds_alternative<Directions>(task.attenuation), task.label,
        ": only gains of directions can be scoped; give such gains for this module, or do not scope the policy");
}

void check_options(const CorrectionOptions& options) {
  check(options.rule != RankRule::fixed || options.rank >= 1, "rank is ", options.rank, "; it must be at least 1");
  const double usual = options.usual_energy.value_or(1);
  check(usual > 0 && usual <= 1, "usual_energy is ", usual, "; it must lie in (0, 1]");
}

void check_task(const CorrectionTask& task) {
  const auto& [b, a, scale] = task.pair;
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
  if (task.scope) {
    check_scope(task);
  }
}

}  // namespace

void check_tasks(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  check_options(options);
  std::for_each(tasks.begin(), tasks.end(), check_task);
}

}  // namespace csulora
