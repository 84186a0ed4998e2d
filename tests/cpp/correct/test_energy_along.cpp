#include <ATen/ATen.h>
#include <csulora/correct.h>
#include <csulora/error.h>
#include <doctest/doctest.h>

#include <vector>

#include "correct/cases.h"

namespace {

using csulora::CorrectionTask;
using csulora::energy_along;
using namespace cases;

double norm2(const at::Tensor& matrix) { return matrix.square().sum().item<double>(); }

/// The dense twin, over all modules together.
double expected(const std::vector<CorrectionTask>& tasks, int64_t directions) {
  double along = 0, all = 0;
  for (const auto& task : tasks) {
    const auto dw = task.factors.b.to(at::kDouble).matmul(task.factors.a.to(at::kDouble)) * task.factors.scale;
    const auto u = task.subspace.u.narrow(1, 0, directions).to(at::kDouble);
    const auto v = task.subspace.v.narrow(1, 0, directions).to(at::kDouble);
    along += (norm2(u.t().matmul(dw)) + norm2(dw.matmul(v))) / 2;
    all += norm2(dw);
  }
  return along / all;
}

TEST_CASE("the energy along directions is the share that is written and read there, over all modules") {
  for (const int64_t rank : {3, 50}) {  // 50 columns are more than the second matrix has
    const std::vector<CorrectionTask> tasks{task(random_factors(60, 70, rank), random_subspace(60, 70, 9)),
                                            task(random_factors(40, 30, rank, 5), random_subspace(40, 30, 7))};
    for (const int64_t directions : {1, 4, 7}) {
      CHECK(energy_along(tasks, directions) == doctest::Approx(expected(tasks, directions)).epsilon(1e-5));
    }
    CHECK(energy_along(tasks, 0) == 0);
    CHECK(energy_along(tasks, 64) > energy_along(tasks, 7));  // the first subspace has 9
  }
}

TEST_CASE("an adapter that changes nothing has no energy") {
  auto nothing = task(random_factors(40, 30, 3), random_subspace(40, 30, 5));
  nothing.factors.scale = 0;
  CHECK(energy_along({nothing}, 5) == 0);
  CHECK(energy_along({}, 5) == 0);
}

TEST_CASE("the energy of what does not fit is refused by name") {
  const auto mismatched = task(random_factors(40, 30, 3), random_subspace(50, 30, 5));
  CHECK_THROWS_WITH_AS(energy_along({mismatched}, 5), doctest::Contains("layer"), csulora::InputError);
  CHECK_THROWS_AS(energy_along({}, -1), csulora::InputError);
}

}  // namespace
