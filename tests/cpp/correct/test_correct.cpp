#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <csulora/correct.h>
#include <csulora/error.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "correct/cases.h"
#include "dense.h"

namespace {

using csulora::Attenuation;
using csulora::Components;
using csulora::Correction;
using csulora::CorrectionOptions;
using csulora::CorrectionTask;
using csulora::Directions;
using csulora::Gains;
using csulora::InputError;
using csulora::LoraFactors;
using csulora::Penalties;
using csulora::RankRule;
using csulora::Subspace;
using dense::Matrix;
using namespace cases;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// The four components of an update, formed densely.
struct DenseComponents {
  Matrix aligned, left, right, off;

  Matrix combined(const Gains& gains) const {
    return gains.aligned * aligned + gains.left * left + gains.right * right + gains.off * off;
  }
};

DenseComponents components_of(const Matrix& update, const Subspace& subspace) {
  const auto u = dense::matrix(subspace.u);
  const auto v = dense::matrix(subspace.v);
  const auto rows_inside = u * (transposed(u) * update);
  const auto rows_outside = update - rows_inside;
  const auto aligned = (rows_inside * v) * transposed(v);
  const auto right = (rows_outside * v) * transposed(v);
  return {aligned, rows_inside - aligned, right, rows_outside - right};
}

Gains closed_form(const Penalties& penalties, const Components& energies) {
  const auto gain = [](double penalty, double energy) {
    return penalty == kInfinity ? 0.0 : 1 / (1 + penalty * energy);
  };
  const double partial = gain(penalties.partial, energies.left + energies.right);
  return {gain(penalties.aligned, energies.aligned), partial, partial, gain(penalties.off, energies.off)};
}

const std::vector<Penalties> kPresets{{0, 1, 1}, {0, kInfinity, kInfinity}, {1, 1, 0}, {0, 0, 0}, {3, 0.5, 20}};

TEST_CASE("every preset gives the closed form of dense arithmetic") {
  const auto factors = random_factors(60, 40, 6);
  const auto subspace = random_subspace(60, 40, 9);
  const auto components = components_of(update(factors), subspace);
  const double norm2 = std::pow(norm(update(factors)), 2);
  const Components energies{
      inner(components.aligned, components.aligned) / norm2, inner(components.left, components.left) / norm2,
      inner(components.right, components.right) / norm2, inner(components.off, components.off) / norm2};
  for (const auto& preset : kPresets) {
    const auto result = csulora::correct(task(factors, subspace, preset), kExact);
    const auto gains = closed_form(preset, energies);
    CHECK(result.energies.aligned == doctest::Approx(energies.aligned));
    CHECK(result.energies.left == doctest::Approx(energies.left));
    CHECK(result.energies.right == doctest::Approx(energies.right));
    CHECK(result.energies.off == doctest::Approx(energies.off));
    CHECK(result.gains.aligned == doctest::Approx(gains.aligned));
    CHECK(result.gains.left == doctest::Approx(gains.left));
    CHECK(result.gains.right == doctest::Approx(gains.right));
    CHECK(result.gains.off == doctest::Approx(gains.off));
    const auto reference = components.combined(gains);
    CHECK(relative_error(result, reference) < kTolerance);
    CHECK(result.norm == doctest::Approx(std::sqrt(norm2)));
    CHECK(result.relative_change == doctest::Approx(norm(reference - update(factors)) / std::sqrt(norm2)));
    CHECK(result.factors.scale == 1);
    CHECK((result.factors.b.scalar_type() == at::kFloat));
  }
}

/// I - basis (1 - gains) basis^T, for gains of all columns.
Matrix attenuating(const Matrix& basis, const std::vector<double>& gains) {
  std::vector<double> removed, ones(basis.rows(), 1);
  for (const double gain : gains) {
    removed.push_back(1 - gain);
  }
  return dense::diagonal(ones) - basis * dense::diagonal(removed) * transposed(basis);
}

TEST_CASE("directions have gains of their own, beside modules whose components do") {
  const auto factors = random_factors(60, 40, 6);
  const auto subspace = random_subspace(60, 40, 3);
  const Directions directions{{0, 0.25}, {1, 0.5, 0.75}, {0.5, 0, -2}};
  const auto none = LoraFactors{at::zeros({60, 6}), factors.a, 1};
  const auto results = csulora::correct({task(factors, subspace, Penalties{}), task(factors, subspace, directions),
                                         task(none, subspace, directions), task(factors, subspace, Directions{})});

  const auto u = dense::matrix(subspace.u), v = dense::matrix(subspace.v);
  const auto kept = attenuating(u, {0, 0.25, 1}) * update(factors) * attenuating(v, {1, 0.5, 0.75});
  const auto expected = kept + u * dense::diagonal({1.5, 0, -2}) * transposed(v);
  CHECK(results[1].factors.b.size(1) == 8);
  CHECK(relative_error(results[1], expected) < kTolerance);
  CHECK(results[1].relative_change == doctest::Approx(norm(expected - update(factors)) / norm(update(factors))));
  const auto components = components_of(update(factors), subspace), kept_components = components_of(expected, subspace);
  CHECK(results[1].gains.left == doctest::Approx(norm(kept_components.left) / norm(components.left)));
  CHECK(results[1].gains.right == doctest::Approx(norm(kept_components.right) / norm(components.right)));

  const auto alone = csulora::correct(task(factors, subspace, Penalties{}));
  CHECK(at::equal(results[0].factors.b, alone.factors.b));
  CHECK(norm(update(results[2].factors)) == 0);
  CHECK(results[2].factors.b.size(1) == 6);
  CHECK(relative_error(results[3], update(factors)) < kTolerance);
  CHECK(results[3].relative_change < kTolerance);
}

TEST_CASE("with an input filter directions act on some inputs alone") {
  const auto factors = random_factors(60, 40, 6);
  const auto subspace = random_subspace(60, 40, 3);
  const csulora::InputFilter input_filter{at::randn({40, 4}) / 6, at::randn({40, 4}) / 6};
  auto filtered = task(factors, subspace, Directions{{0, 0.25}, {1, 0.5, 0.75}, {0.5, 0, -2}});
  const auto before = update(factors), target = update(csulora::correct(filtered, kExact).factors);
  filtered.input_filter = input_filter;
  const auto expected =
      before + (target - before) * dense::matrix(input_filter.p) * transposed(dense::matrix(input_filter.q));

  const auto exact = csulora::correct(filtered, kExact);
  CHECK(exact.factors.b.size(1) == 9);
  CHECK(relative_error(exact, expected) < kTolerance);
  CHECK(exact.relative_change == doctest::Approx(norm(expected - before) / norm(before)));
  CHECK(exact.truncation_error == 0);
  const auto kept = csulora::correct(filtered);
  CHECK(kept.factors.b.size(1) == 8);
  CHECK(relative_error(kept, expected) == doctest::Approx(std::sqrt(kept.truncation_error)).epsilon(1e-3));
  CHECK(kept.relative_change == exact.relative_change);

  filtered.attenuation = Penalties{};
  CHECK_THROWS_WITH_AS(csulora::correct(filtered), doctest::Contains("layer: only gains of directions"), InputError);
  filtered.attenuation = Directions{};
  for (const auto& q : {at::ones({39, 4}), at::ones({40, 3}), at::ones({40, 4}, at::kHalf)}) {
    filtered.input_filter = csulora::InputFilter{input_filter.p, q};
    CHECK_THROWS_WITH_AS(csulora::correct(filtered), doctest::Contains("layer: the "), InputError);
  }
}

TEST_CASE("gains of directions follow the energy along them, over all tasks of a call") {
  const auto one = random_factors(60, 40, 6), other = random_factors(60, 40, 2);
  const auto subspace = random_subspace(60, 40, 3);
  const auto u = dense::matrix(subspace.u), v = dense::matrix(subspace.v);
  double along = 0, all = 0;
  for (const auto& factors : {one, other}) {
    along += (std::pow(norm(transposed(u) * update(factors)), 2) + std::pow(norm(update(factors) * v), 2)) / 2;
    all += std::pow(norm(update(factors)), 2);
  }
  const double penalty_scale = std::pow(along / all / 0.04, 2);
  const auto followed = [&](double gain) { return gain / (gain + (1 - gain) * penalty_scale); };
  const Directions directions{{0, 0.25, 1}, {1, 0.5, 0.75}, {}};
  CorrectionOptions options;
  options.reference_energy = 0.04;
  const auto results = csulora::correct({task(one, subspace, directions), task(other, subspace, directions)}, options);
  const auto expected =
      attenuating(u, {0, followed(0.25), 1}) * update(one) * attenuating(v, {1, followed(0.5), followed(0.75)});
  CHECK(relative_error(results[0], expected) < kTolerance);
  for (const double reference : {0.0, -1.0, 1.5, kNan}) {
    options.reference_energy = reference;
    CHECK_THROWS_WITH_AS(csulora::correct(task(one, subspace, directions), options),
                         doctest::Contains("reference_energy"), InputError);
  }
}

TEST_CASE("where directions take away nearly all, the rest is exact, and the input stays as it was") {
  const auto subspace = random_subspace(60, 40, 3);
  const auto mixture = at::randn({3, 6}, at::kDouble), rest = at::randn({60, 6}, at::kDouble);
  const auto b = (subspace.u.to(at::kDouble).mm(mixture) + 1e-6 * rest).to(at::kFloat);
  const LoraFactors factors{b.clone(), at::randn({6, 40}), 0.5};
  const Directions directions{{0, 0, 0}, {}, {}};
  const auto result = csulora::correct(task(factors, subspace, directions));
  const auto expected = attenuating(dense::matrix(subspace.u), {0, 0, 0}) * update(factors);
  CHECK(norm(expected) < 1e-5 * norm(update(factors)));
  CHECK(relative_error(result, expected) < kTolerance);
  CHECK(at::equal(factors.b, b));
}

TEST_CASE("directions that a subspace lacks, and numbers that are none, are an InputError") {
  const auto factors = random_factors(60, 40, 6);
  const auto subspace = random_subspace(60, 40, 3);
  const std::vector<std::pair<Directions, const char*>> cases{
      {{{1, 1, 1, 1}, {}, {}}, "layer: the policy has numbers for 4 left directions, and the subspace file has 3"},
      {{{}, {}, {0, 0, 0, 1}}, "4 reinforced directions"},
      {{{1.5}, {}, {}}, "[0, 1]"},
      {{{}, {kNan}, {}}, "[0, 1]"},
      {{{}, {}, {kInfinity}}, "not finite"},
  };
  for (const auto& [directions, reason] : cases) {
    CHECK_THROWS_WITH_AS(csulora::correct(task(factors, subspace, directions)), doctest::Contains(reason), InputError);
  }
}

TEST_CASE("shapes at the limits") {
  struct Shape {
    int64_t rows, columns, rank, k;
  };
  for (const auto& [rows, columns, rank, k] :
       {Shape{30, 20, 4, 20}, Shape{20, 30, 4, 20}, Shape{9, 7, 12, 3}, Shape{40, 30, 1, 1}, Shape{30, 40, 5, 0}}) {
    CAPTURE(rows);
    CAPTURE(rank);
    CAPTURE(k);
    const auto factors = random_factors(rows, columns, rank);
    const auto subspace = random_subspace(rows, columns, k);
    const auto result = csulora::correct(task(factors, subspace, Penalties{2, 1, 3}), kExact);
    const auto reference = components_of(update(factors), subspace).combined(closed_form({2, 1, 3}, result.energies));
    CHECK(relative_error(result, reference) < kTolerance);
  }
}

TEST_CASE("an update of more columns than its matrix has comes back in as many, whatever is kept") {
  const std::pair<at::ScalarType, double> dtypes[] = {
      {at::kFloat, kTolerance}, {at::kHalf, 0x1p-10}, {at::kBFloat16, 0x1p-7}};
  const std::vector<double> left{0.5, 1, 1, 1}, right{0.25, 0, 1, 1};
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{9, 30}, {30, 9}, {12, 12}}) {
    for (const auto& [dtype, tolerance] : dtypes) {
      CAPTURE(rows);
      auto wide = random_factors(rows, columns, 5000, 3, 1e-3);
      wide.b = wide.b.to(dtype);
      wide.a = wide.a.to(dtype);
      const auto subspace = random_subspace(rows, columns, 4, dtype);
      const auto u = dense::matrix(subspace.u), v = dense::matrix(subspace.v);
      const auto components = components_of(update(wide), subspace);
      std::vector<CorrectionTask> tasks{
          task(wide, subspace, Directions{left, right, {}}),
          task(random_factors(rows, columns, 2), subspace),
      };
      for (const auto& preset : kPresets) {
        tasks.push_back(task(wide, subspace, preset));
      }
      const auto results = csulora::correct(tasks);
      const auto along = attenuating(u, left) * update(wide) * attenuating(v, right);
      CHECK(relative_error(results[0], along) < tolerance);
      CHECK(results[1].factors.b.size(1) == 2);
      for (size_t i = 0; i < kPresets.size(); ++i) {
        const auto& result = results[i + 2];
        CHECK(relative_error(result, components.combined(closed_form(kPresets[i], result.energies))) < tolerance);
        CHECK(result.factors.b.size(1) == std::min(rows, columns));
        CHECK((result.factors.b.scalar_type() == dtype));
        CHECK((result.factors.a.scalar_type() == dtype));
      }
    }
  }
}

TEST_CASE("factors in half precision are taken as they are, and rounded once at the end") {
  // Rounding b and a once each moves their product by at most two units in the last place.
  const std::pair<at::ScalarType, double> dtypes[] = {{at::kHalf, 0x1p-10}, {at::kBFloat16, 0x1p-7}};
  for (const auto& [dtype, rounding] : dtypes) {
    auto factors = random_factors(50, 40, 5);
    factors.b = factors.b.to(dtype);
    factors.a = factors.a.to(dtype);
    const auto subspace = random_subspace(50, 40, 8, dtype);
    const auto result = csulora::correct(task(factors, subspace), kExact);
    CHECK((result.factors.b.scalar_type() == dtype));
    CHECK((result.factors.a.scalar_type() == dtype));
    CHECK(relative_error(result, components_of(update(factors), subspace).combined(result.gains)) < rounding);
  }
}

TEST_CASE("four gains are applied as they are") {
  const auto factors = random_factors(40, 50, 5);
  const auto subspace = random_subspace(40, 50, 7);
  for (const auto& gains :
       {Gains{1, 0, 0, 0}, Gains{0, 0, 0, 1}, Gains{0.3, 0.9, 0.2, 0.6}, Gains{0.5, 1, 0.25, 0.5}}) {
    const auto result = csulora::correct(task(factors, subspace, gains), kExact);
    CHECK(result.gains.left == gains.left);
    CHECK(result.gains.right == gains.right);
    CHECK(relative_error(result, components_of(update(factors), subspace).combined(gains)) < kTolerance);
  }
  CHECK(norm(update(csulora::correct(task(factors, subspace, Gains{0, 0, 0, 0}), kExact).factors)) == 0);
}

TEST_CASE("rank rules") {
  const int64_t rank = 6;
  const auto factors = random_factors(50, 40, rank);
  const auto subspace = random_subspace(50, 40, 8);
  const auto exact = csulora::correct(task(factors, subspace), kExact);
  const auto full = update(exact.factors);
  CHECK(exact.factors.b.size(1) == 2 * rank);
  CHECK(exact.truncation_error < 1e-12);

  const auto correct_to = [&](int64_t cap) {
    return csulora::correct(task(factors, subspace), CorrectionOptions{RankRule::fixed, cap});
  };
  const auto truncation_error = [&](const Correction& result) {
    return std::pow(norm(update(result.factors) - full) / norm(full), 2);
  };
  const auto keep = csulora::correct(task(factors, subspace));
  CHECK((keep.factors.b.sizes() == factors.b.sizes()));
  CHECK((keep.factors.a.sizes() == factors.a.sizes()));
  CHECK(keep.truncation_error == doctest::Approx(truncation_error(keep)));
  CHECK(keep.truncation_error == correct_to(rank).truncation_error);
  double previous = 1;
  for (int64_t cap = 1; cap < 2 * rank; ++cap) {
    const auto cut = correct_to(cap);
    CHECK(cut.factors.a.size(0) == cap);
    CHECK(cut.truncation_error == doctest::Approx(truncation_error(cut)));
    CHECK(cut.truncation_error < previous);
    previous = cut.truncation_error;
  }
  CHECK(correct_to(100).factors.b.size(1) == 2 * rank);

  // The hard projection has the rank of the update itself; `none` hands its factors back.
  const auto projected = csulora::correct(task(factors, subspace, Penalties{0, kInfinity, kInfinity}), kExact);
  CHECK(projected.factors.b.size(1) == rank);
  const auto same = csulora::correct(task(factors, subspace, Penalties{0, 0, 0}));
  CHECK(at::equal(same.factors.b, factors.b * factors.scale));
  CHECK(at::equal(same.factors.a, factors.a));
}

TEST_CASE("many modules at once give the bits of one at a time, on any number of threads") {
  std::vector<CorrectionTask> tasks;
  for (uint64_t seed = 0; seed < 7; ++seed) {
    tasks.push_back(task(random_factors(70 + 10 * seed, 50, 4, seed), random_subspace(70 + 10 * seed, 50, 6)));
  }
  const int threads = at::get_num_threads();
  std::vector<Correction> reference;
  for (const auto& one : tasks) {
    reference.push_back(csulora::correct(one));
  }
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    const auto together = csulora::correct(tasks);
    REQUIRE(together.size() == tasks.size());
    for (size_t i = 0; i < tasks.size(); ++i) {
      CHECK(at::equal(together[i].factors.b, reference[i].factors.b));
      CHECK(at::equal(together[i].factors.a, reference[i].factors.a));
      CHECK(together[i].undo == reference[i].undo);
    }
  }
  at::set_num_threads(threads);
  CHECK(csulora::correct(std::vector<CorrectionTask>{}).empty());
}

TEST_CASE("what cannot be corrected is an InputError that says which module and why") {
  const auto good = random_factors(20, 16, 3);
  const auto subspace = random_subspace(20, 16, 4);
  const auto ones = [](int64_t rows, int64_t columns) { return at::ones({rows, columns}); };
  const auto factors = [&](at::Tensor b, at::Tensor a, double scale = 1) { return task({b, a, scale}, subspace); };
  const auto other = [&](at::Tensor u, at::Tensor s, at::Tensor v) { return task(good, Subspace{u, s, v}); };
  struct Case {
    CorrectionTask task;
    const char* reason;
  };
  const std::vector<Case> cases{
      {factors({}, good.a), "b is missing"},
      {factors(at::ones(20), good.a), "dimensions"},
      {factors(ones(20, 2), good.a), "inner dimensions"},
      {factors(ones(20, 0), ones(0, 16)), "at least 1"},
      {factors(ones(21, 3), good.a), "subspace is for"},
      {factors(good.b.to(at::kDouble), good.a), "float16, bfloat16 or float32"},
      {factors(good.b.to_sparse(), good.a), "sparse"},
      {factors(good.b * kNan, good.a), "NaN"},
      {factors(good.b, good.a * kInfinity), "NaN"},
      {factors(good.b * 1e38, good.a * 1e38, 16), "too large"},
      {factors(good.b, good.a, kInfinity), "scale"},
      {other(subspace.u.narrow(1, 0, 3), subspace.s, subspace.v), "agree on the number"},
      {other(subspace.u, at::Tensor(), subspace.v), "float32 vector"},
      {other(subspace.u.to(at::kHalf), subspace.s, subspace.v), "one dtype"},
      {other(subspace.u, subspace.s * kNan, subspace.v), "NaN"},
      {task(good, subspace, Penalties{-1, 0, 0}), "penalty `aligned`"},
      {task(good, subspace, Penalties{0, kNan, 0}), "penalty `partial`"},
      {task(good, subspace, Gains{0, 0, 0, 1.5}), "gain `off`"},
      {task(good, subspace, Gains{0, kNan, 0, 0}), "gain `left`"},
  };
  for (const auto& [bad, reason] : cases) {
    CAPTURE(reason);
    CHECK_THROWS_WITH_AS(csulora::correct(bad), doctest::Contains(reason), InputError);
    CHECK_THROWS_WITH_AS(csulora::correct(bad), doctest::Contains("layer: "), InputError);
  }
  CHECK_THROWS_WITH_AS(csulora::correct(task(good, subspace), CorrectionOptions{RankRule::fixed, 0}),
                       doctest::Contains("rank is 0"), InputError);
  CHECK_THROWS_AS(csulora::correct(cases.front().task), csulora::Error);

  std::vector<CorrectionTask> several{task(good, subspace), cases[7].task, cases[7].task};
  several[1].label = "first";
  several[2].label = "second";
  CHECK_THROWS_WITH_AS(csulora::correct(several), doctest::Contains("first: "), InputError);
}

}  // namespace
