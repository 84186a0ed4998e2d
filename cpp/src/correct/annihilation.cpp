#include "csulora/annihilation.h"

#include <ATen/ATen.h>

#include <utility>

#include "correct/storage.h"
#include "correct/thin.h"
#include "linalg/row_blocks.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

using at::Tensor;

void check_task(const AnnihilationTask& task) {
  const auto& [factors, weight, label] = task;
  check_matrix(factors.b, label + ": b");
  check_matrix_of_any_dtype(factors.a, label + ": a");
  if (factors.a.scalar_type() != at::kDouble) {  // as sketches are
    check_matrix(factors.a, label + ": a");
  }
  check_matrix(weight, label + ": the weight");
  check(factors.b.is_cpu() && factors.a.is_cpu() && weight.is_cpu(), label,
        ": annihilation is measured on the CPU; move the factors and the weight there");
  check(factors.b.size(1) == factors.a.size(0), label, ": b is ", factors.b.sizes(), " and a is ", factors.a.sizes(),
        "; their inner dimensions must be equal");
  check(factors.b.size(0) == weight.size(0) && factors.a.size(1) == weight.size(1), label, ": the update is of a [",
        factors.b.size(0), ", ", factors.a.size(1), "] matrix, and the weight is ", weight.sizes());
}

/// Of the sum of singular values, what rounding to float64 may leave. Less would be enough to hide what is removed
/// beside a component that is large, and harmless where no input has what it reads.
constexpr double kRoundingOfUpdate = 1e-13;
/// The same of a matrix that float32 may have rounded.
constexpr double kRoundingOfWeight = 1e-7;

/// How many of some descending singular values are more than rounding.
int64_t notable(const Tensor& values, double rounding) {
  return values.gt(values.sum() * rounding).sum().item<int64_t>();
}

bool is_finite(const Tensor& matrix) { return matrix.isfinite().all().item<bool>(); }

/// An orthonormal basis (m, r') of an update's column space, and the update in it (r', n).
struct Written {
  Tensor basis, update;
};

Written written(const LoraFactors& factors, const std::string& label) {
  const auto& [b, a, scale] = is_wide(factors) ? thinned(factors) : factors;
  const auto [b_columns, b_root] = at::linalg_qr(widened(b, at::kDouble) * scale);
  const auto [a_columns, a_root] = at::linalg_qr(widened(a, at::kDouble).t());
  const auto root = b_root.mm(a_root.t());
  check(is_finite(root), label, ": the update holds NaN or infinity, or numbers whose product is none");
  const auto [left, values, right] = at::linalg_svd(root, /*full_matrices=*/false);
  const int64_t rank = notable(values, kRoundingOfUpdate);
  const auto mixed_rows = right.narrow(0, 0, rank) * values.narrow(0, 0, rank).unsqueeze(1);
  return {b_columns.mm(left.narrow(1, 0, rank)), mixed_rows.mm(a_columns.t())};
}

/// basis^T W (r', n).
Tensor written_before(const Tensor& basis, const Tensor& weight) {
  auto before = at::zeros({basis.size(1), weight.size(1)}, basis.options());
  for_row_blocks(weight.size(0), weight.size(1), [&](int64_t row, int64_t count) {
    before.addmm_(basis.narrow(0, row, count).t(), widened(weight.narrow(0, row, count), at::kDouble));
  });
  return before;
}

Annihilation annihilation(const AnnihilationTask& task) {
  const auto [basis, update] = written(task.factors, task.label);
  const auto before = written_before(basis, task.weight);
  check(is_finite(before), task.label, ": the weight holds NaN or infinity");
  // |u^T W| is the norm of u's coordinates along the left singular vectors, times the singular values.
  const auto [left, values, right] = at::linalg_svd(before, /*full_matrices=*/false);
  const int64_t known = notable(values, kRoundingOfWeight);
  Annihilation found{1, basis.size(1)};
  if (known > 0) {
    const auto coordinates = left.narrow(1, 0, known) / values.narrow(0, 0, known);
    const auto after = right.narrow(0, 0, known) + coordinates.t().mm(update);
    const auto smallest = std::get<1>(at::linalg_svd(after, /*full_matrices=*/false))[known - 1].item<double>();
    found.ratio = smallest * smallest;
  }
  return found;
}

}  // namespace

std::vector<Annihilation> annihilations(const std::vector<AnnihilationTask>& tasks) {
  for (const auto& task : tasks) {
    check_task(task);
  }
  std::vector<Annihilation> found(tasks.size());
  for_each_in_parallel(tasks.size(), [&](size_t i) {
    const TorchGuards torch_guards;
    found[i] = annihilation(tasks[i]);
  });
  return found;
}

}  // namespace csulora
