#include <ATen/ATen.h>
#include <csulora/correct.h>
#include <doctest/doctest.h>

#include <vector>

#include "correct/cases.h"
#include "dense.h"

namespace {

using csulora::Attenuation;
using csulora::CorrectionOptions;
using csulora::Directions;
using csulora::Gains;
using csulora::InputFilter;
using csulora::LoraFactors;
using csulora::Penalties;
using csulora::RankRule;
using csulora::Subspace;
using namespace cases;

/// -<X, U S V^T> / |S|^2.
double undo(const dense::Matrix& x, const Subspace& subspace) {
  const auto singular = dense::diagonal(dense::values(subspace.s));
  const auto alignment = dense::matrix(subspace.u) * singular * transposed(dense::matrix(subspace.v));
  return -inner(x, alignment) / inner(singular, singular);
}

TEST_CASE("undo is the share of the displacement that the update takes back") {
  const auto subspace = random_subspace(40, 30, 5);
  for (const double share : {1.0, 0.25, -0.5}) {
    const LoraFactors factors{subspace.u.mul(subspace.s), subspace.v.t().contiguous(), -share};
    const auto result = csulora::correct(task(factors, subspace));
    CHECK(result.undo == doctest::Approx(share));
    CHECK(result.energies.aligned == doctest::Approx(1));
  }
}

TEST_CASE("undo_after is the undo of the factors that come back, whatever is kept and whatever the rank") {
  const auto subspace = random_subspace(60, 40, 9);
  const std::vector<Attenuation> attenuations{
      Penalties{0, 0, 0},
      Penalties{0, 1, 1},
      Penalties{0, kInfinity, kInfinity},
      Penalties{3, 0.5, 20},
      Gains{0.5, 1, 0.25, 0.5},
      Gains{0.7, 0.7, 0.7, 0.7},
      Directions{{0, 0.25}, {1, 0.5, 0.75}, {}},
      Directions{{0, 0.25}, {1, 0.5, 0.75}, {0.5, 0, -2}},
  };
  for (const int64_t rank : {1, 6, 50}) {  // 50 columns are more than the matrix has
    const auto factors = random_factors(60, 40, rank);
    for (const auto& attenuation : attenuations) {
      for (const auto& options : {CorrectionOptions{}, kExact, CorrectionOptions{RankRule::fixed, 4}}) {
        const auto result = csulora::correct(task(factors, subspace, attenuation), options);
        const double largest = norm(update(factors)) / norm(dense::diagonal(dense::values(subspace.s)));
        CHECK(std::abs(result.undo_after - undo(update(result.factors), subspace)) <= kTolerance * largest);
      }
    }
  }
}

TEST_CASE("undo_after with an input filter is that of the factors that come back") {
  const auto subspace = random_subspace(60, 40, 9);
  auto filtered = task(random_factors(60, 40, 6), subspace, Directions{{0, 0.25}, {1, 0.5, 0.75}, {0.5, 0, -2}});
  filtered.input_filter = InputFilter{at::randn({40, 4}) / 6, at::randn({40, 4}) / 6};
  for (const auto& options : {CorrectionOptions{}, kExact, CorrectionOptions{RankRule::fixed, 4}}) {
    const auto result = csulora::correct(filtered, options);
    CHECK(result.undo_after == doctest::Approx(undo(update(result.factors), subspace)).epsilon(1e-4));
  }
}

TEST_CASE("undo_after equals undo where everything is kept, and is 0 where the aligned component is removed") {
  const auto subspace = random_subspace(60, 40, 9);
  const auto factors = random_factors(60, 40, 6);
  const auto kept = csulora::correct(task(factors, subspace, Penalties{0, 0, 0}));
  CHECK(kept.undo != 0);
  CHECK(kept.undo_after == kept.undo);
  const auto removed = csulora::correct(task(factors, subspace, Penalties{kInfinity, 0, 0}), kExact);
  CHECK(removed.undo_after == 0);
  const auto cut = csulora::correct(task(factors, subspace, Penalties{kInfinity, kInfinity, 0}));
  CHECK(std::abs(cut.undo_after) < 1e-12);
}

}  // namespace
