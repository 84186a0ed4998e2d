#include "directions.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "check.h"
#include "correction_device.h"
#include "storage.h"
#include "workers.h"

namespace csulora {
namespace {

using at::Tensor;

constexpr Gains kEverything{1, 1, 1, 1};

/// Factors b (m, r) and a (r, n) in float64.
struct Factors {
  Tensor b;
  Tensor a;
};

Tensor widened(const Tensor& matrix) {
  return matrix.to(at::kFloat).to(at::kDouble);  // at once, float16 takes five times as long
}

/// The first columns of a basis (m, k), as many as there are numbers, in float64.
Tensor first_columns(const Tensor& basis, const std::vector<double>& numbers) {
  return widened(basis.narrow(1, 0, static_cast<int64_t>(numbers.size())));
}

/// (I - basis (1 - gains) basis^T) factor, for a factor (m, r) and the first columns of a basis (m, k).
Tensor attenuated(const Tensor& factor, const Tensor& basis, const std::vector<double>& gains) {
  const auto columns = first_columns(basis, gains);
  const auto removed = 1 - at::tensor(gains, columns.options());
  return factor.addmm(columns, columns.t().mm(factor).mul_(removed.unsqueeze(1)), 1, -1);
}

/// <b^T b, a a^T> = |b a|^2 for b (m, r) and a (r, n).
double norm2(const Tensor& b, const Tensor& a) {
  return std::max(0.0, b.t().mm(b).mul_(a.mm(a.t())).sum().item<double>());
}

Factors update(const LoraPair& pair) { return {widened(pair.b).mul_(pair.scale), widened(pair.a)}; }

/// An update's energy, and how much of it lies along the directions that its task names.
struct Energy {
  double along = 0;
  double whole = 0;
};

Energy energy(const CorrectionTask& task, const Factors& whole) {
  const auto& [left, right, restored] = std::get<Directions>(task.attenuation);
  const double written = norm2(first_columns(task.subspace.u, left).t().mm(whole.b), whole.a);
  const double read = norm2(whole.b, whole.a.mm(first_columns(task.subspace.v, right)));
  return {(written + read) / 2, norm2(whole.b, whole.a)};
}

/// By how much an adapter's penalties are multiplied.
double strength(const std::vector<Energy>& energies, double usual_energy) {
  check(usual_energy > 0 && usual_energy <= 1, "usual_energy is ", usual_energy, "; it must lie in (0, 1]");
  Energy sum;
  for (const auto& each : energies) {
    sum.along += each.along;
    sum.whole += each.whole;
  }
  return sum.whole > 0 ? std::max(std::pow(sum.along / sum.whole / usual_energy, 2), kLeastStrength) : 1;
}

/// Gains whose penalties (1 - gain) / gain are multiplied by a strength.
std::vector<double> strengthened(std::vector<double> gains, double strength) {
  std::transform(gains.begin(), gains.end(), gains.begin(), [strength](double gain) {
    return gain > 0 && gain < 1 ? gain / (gain + (1 - gain) * strength) : gain;
  });
  return gains;
}

/// @param whole    the task's update
/// @param restore  whether to add what the task says, which is not done to dW = 0
Factors corrected(const CorrectionTask& task, const Factors& whole, double strength, bool restore) {
  const auto& [left, right, restored] = std::get<Directions>(task.attenuation);
  const auto& subspace = task.subspace;
  const auto b = attenuated(whole.b, subspace.u, strengthened(left, strength));
  const auto a = attenuated(whole.a.t(), subspace.v, strengthened(right, strength)).t();
  if (!restore) {
    return {b, a};
  }
  const auto multiples = at::tensor(restored, b.options());
  const auto chosen = multiples.nonzero().flatten();
  const auto of_chosen = [&](const Tensor& factor) { return widened(factor.index_select(-1, chosen)); };
  const auto added = of_chosen(subspace.u).mul_(of_chosen(subspace.s).mul_(multiples.index_select(0, chosen)));
  return {at::cat({b, added}, 1), at::cat({a, of_chosen(subspace.v).t()}, 0)};
}

/// |b a - b' a'|.
double distance(const Factors& one, const Factors& other) {
  return std::sqrt(norm2(at::cat({one.b, other.b.neg()}, 1), at::cat({one.a, other.a}, 0)));
}

/// |X_c| / |dW_c| for every part.
Gains applied(const Correction& before, const Correction& after, double most) {
  const auto gain = [&](double energy, double kept) {
    const double norm2 = energy * before.norm * before.norm;
    return norm2 > 0 ? std::min(most, std::sqrt(kept * after.norm * after.norm / norm2)) : 1;
  };
  const auto &from = before.energies, &to = after.energies;
  return {gain(from.aligned, to.aligned), gain(from.left, to.left), gain(from.right, to.right), gain(from.off, to.off)};
}

void check_numbers(const CorrectionTask& task) {
  const auto& [left, right, restored] = std::get<Directions>(task.attenuation);
  const auto check_count = [&](const std::vector<double>& numbers, const char* name) {
    const int64_t count = static_cast<int64_t>(numbers.size()), known = task.subspace.s.size(0);
    check(count <= known, task.label, ": the policy has numbers for ", count, " ", name,
          " directions, and the pack has ", known, "; use the pack that the policy is for");
  };
  check_count(left, "left");
  check_count(right, "right");
  check_count(restored, "restored");
  for (const auto* gains : {&left, &right}) {
    check(std::all_of(gains->begin(), gains->end(), [](double gain) { return gain >= 0 && gain <= 1; }), task.label,
          ": a gain of a direction does not lie in [0, 1]");
  }
  check(std::all_of(restored.begin(), restored.end(), [](double multiple) { return std::isfinite(multiple); }),
        task.label, ": a multiple of a direction is not finite");
}

/// Calls work(i) for every task: in parallel where a CPU's threads do it, in order where one queue of a GPU does.
template <typename Work>
void for_each_task(const std::vector<CorrectionTask>& tasks, Work work) {
  if (any_on_device(tasks)) {
    for (size_t i = 0; i < tasks.size(); ++i) {
      work(i);
    }
  } else {
    for_each_in_parallel(tasks.size(), work);
  }
}

/// How far to go with an adapter, see CorrectionOptions::usual_energy.
double strength_for(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  if (!options.usual_energy) {
    return 1;
  }
  std::vector<Energy> energies(tasks.size());
  for_each_task(tasks, [&](size_t i) {
    const c10::NoGradGuard no_grad;
    energies[i] = energy(tasks[i], update(tasks[i].pair));
  });
  return strength(energies, *options.usual_energy);
}

std::vector<Correction> correct_along(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  auto kept = tasks;
  std::for_each(kept.begin(), kept.end(), [](auto& task) { task.attenuation = kEverything; });
  const auto before = correct(kept, {});  // which checks all tensors
  std::for_each(tasks.begin(), tasks.end(), check_numbers);
  const double strength = strength_for(tasks, options);

  std::vector<double> distances(tasks.size());
  for_each_task(tasks, [&](size_t i) {
    const c10::NoGradGuard no_grad;
    const auto whole = update(tasks[i].pair);
    const auto x = corrected(tasks[i], whole, strength, before[i].norm > 0);
    distances[i] = distance(x, whole);
    kept[i].pair = {x.b.to(at::kFloat).contiguous(), x.a.to(at::kFloat).contiguous()};
  });

  auto results = correct(kept, options);
  for_each_task(tasks, [&](size_t i) {
    const c10::NoGradGuard no_grad;
    const bool adds = !std::get<Directions>(tasks[i].attenuation).restored.empty();
    auto& result = results[i];
    result.gains = applied(before[i], result, adds ? std::numeric_limits<double>::infinity() : 1);
    result.pair = stored(result.pair.b, result.pair.a, tasks[i]);
    result.energies = before[i].energies;
    result.norm = before[i].norm;
    result.change = result.norm > 0 ? distances[i] / result.norm : 0;
    result.undo = before[i].undo;
  });
  return results;
}

}  // namespace

bool attenuates_directions(const CorrectionTask& task) { return std::holds_alternative<Directions>(task.attenuation); }

std::vector<Correction> correct_with_directions(const std::vector<CorrectionTask>& tasks,
                                                const CorrectionOptions& options) {
  std::vector<CorrectionTask> along, others;
  for (const auto& task : tasks) {
    (attenuates_directions(task) ? along : others).push_back(task);
  }
  const auto along_results = correct_along(along, options);
  const auto other_results = others.empty() ? std::vector<Correction>{} : correct(others, options);
  std::vector<Correction> results;
  auto next_along = along_results.begin(), next_other = other_results.begin();
  for (const auto& task : tasks) {
    results.push_back(attenuates_directions(task) ? *next_along++ : *next_other++);
  }
  return results;
}

}  // namespace csulora
