#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <csulora/error.h>
#include <csulora/extract.h>
#include <doctest/doctest.h>

#include <climits>
#include <thread>
#include <vector>

#include "runtime/cpu_quota.h"
#include "runtime/workers.h"

TEST_CASE("a control group's quota is rounded up to cores") {
  CHECK(csulora::cpu_quota("200000 100000\n") == 2);
  CHECK(csulora::cpu_quota("150000 100000") == 2);
  CHECK(csulora::cpu_quota("1000 100000") == 1);
  for (const auto* unlimited : {"max 100000", "", "100000", "0 100000", "-1 100000"}) {
    CHECK(csulora::cpu_quota(unlimited) == INT_MAX);
  }
}

TEST_CASE("work within work stays in its thread, and torch's number of threads comes back") {
  const int before = at::get_num_threads();
  csulora::for_each_in_parallel(4, [](size_t) {
    const auto own = std::this_thread::get_id();
    csulora::for_each_in_parallel(3, [&](size_t) { CHECK((std::this_thread::get_id() == own)); });
    const csulora::OwnThreads nested;
    CHECK(at::get_num_threads() == 1);
  });
  CHECK(at::get_num_threads() == before);
}

TEST_CASE("many displacements give what each alone does, in any company") {
  at::manual_seed(4);
  std::vector<csulora::ExtractTask> tasks;
  for (int64_t i = 0; i < 6; ++i) {
    tasks.push_back({at::randn({300, 260 + 10 * (i % 2)}), at::randn({300, 260 + 10 * (i % 2)}), "expert"});
  }
  csulora::ExtractOptions options;
  options.rank = 6;
  const auto together = csulora::extract_subspaces(tasks, options);
  REQUIRE(together.size() == tasks.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    const auto alone = csulora::extract_subspaces({tasks[i]}, options).front();
    CHECK(together[i].u.equal(alone.u));
    CHECK(together[i].s.equal(alone.s));
    CHECK(together[i].v.equal(alone.v));
  }
  tasks[4].aligned = at::ones({3, 3});
  tasks[4].label = "experts.4";
  CHECK_THROWS_WITH_AS(csulora::extract_subspaces(tasks, options), doctest::Contains("experts.4: base is"),
                       csulora::InputError);
  CHECK(csulora::extract_subspaces({}, options).empty());
}
