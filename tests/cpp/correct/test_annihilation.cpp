#include <ATen/ATen.h>
#include <csulora/annihilation.h>
#include <csulora/error.h>
#include <doctest/doctest.h>

#include <limits>
#include <utility>
#include <vector>

#include "correct/cases.h"

namespace {

using csulora::Annihilation;
using csulora::annihilations;
using csulora::AnnihilationTask;
using csulora::LoraFactors;
using csulora::sketches;
using namespace cases;

at::Tensor random_weight(int64_t rows, int64_t columns) { return dense::tensor(dense::gaussian(rows, columns, 21)); }

/// -share u u^T W for a unit vector u.
LoraFactors removal(const at::Tensor& weight, double share) {
  const auto u = dense::tensor(dense::orthonormal(weight.size(0), 1, 22));
  return {-share * u, u.t().mm(weight)};
}

double ratio(const LoraFactors& factors, const at::Tensor& weight) {
  return annihilations({{factors, weight}})[0].ratio;
}

/// Smallest eigenvalue of the pencil of (W + dW) (W + dW)^T and W W^T in the column space of dW.
double expected(const LoraFactors& factors, const at::Tensor& weight) {
  const auto w = weight.to(at::kDouble);
  const auto dw = factors.scale * factors.b.to(at::kDouble).mm(factors.a.to(at::kDouble));
  const auto [left, values, right] = at::linalg_svd(dw, false);
  const auto basis = left.narrow(1, 0, values.gt(1e-7 * values[0]).sum().item<int64_t>());
  const auto gram = [&](const at::Tensor& m) { return basis.t().mm(m).mm(m.t()).mm(basis); };
  const auto root = at::linalg_inv(at::linalg_cholesky(gram(w)));
  return at::linalg_eigvalsh(root.mm(gram(w + dw)).mm(root.t()))[0].item<double>();
}

TEST_CASE("the annihilation ratio is the dense twin's, whatever the rank") {
  const auto weight = random_weight(30, 50);
  for (const int64_t rank : {1, 5, 40}) {  // 40 columns are more than the matrix has rows
    const auto factors = random_factors(30, 50, rank, 3, 0.1);
    const auto found = annihilations({{factors, weight}})[0];
    CHECK(found.ratio == doctest::Approx(expected(factors, weight)).epsilon(1e-6));
    CHECK(found.rank == std::min<int64_t>(rank, 30));
  }
}

TEST_CASE("what removes a direction leaves nothing of it, half of it a quarter") {
  const auto weight = random_weight(30, 50);
  CHECK(ratio(removal(weight, 1), weight) < 1e-12);
  CHECK(ratio(removal(weight, 0.5), weight) == doctest::Approx(0.25));
  CHECK(ratio(removal(weight, 0), weight) == 1);
  CHECK(ratio(removal(weight, 1), at::zeros({30, 50})) == 1);
}

TEST_CASE("tasks are measured by themselves") {
  const auto weight = random_weight(30, 50), other = random_weight(20, 24);
  const auto factors = random_factors(30, 50, 4);
  const auto found = annihilations({{factors, weight}, {removal(other, 1), other}});
  CHECK(found[0].ratio == ratio(factors, weight));
  CHECK(found[1].ratio < 1e-12);
}

TEST_CASE("a sketch keeps norms, depends on its seed, and a prefix on nothing else") {
  const auto weight = random_weight(40, 60);
  const auto found = sketches({weight, weight.narrow(1, 0, 20)}, 4000, 5);
  CHECK(found[0].norm().item<double>() == doctest::Approx(weight.norm().item<double>()).epsilon(0.05));
  CHECK(at::equal(found[1], sketches({weight.narrow(1, 0, 20)}, 4000, 5)[0]));
  CHECK_FALSE(at::equal(found[0], sketches({weight}, 4000, 6)[0]));
  // Independent columns: the mean of the entries of G is within five standard deviations of 0.
  const auto numbers = sketches({at::eye(60)}, 401, 7)[0] * std::sqrt(401.0);
  CHECK(std::abs(numbers.mean().item<double>()) < 5 / std::sqrt(60 * 401.0));
  CHECK(numbers.square().mean().item<double>() == doctest::Approx(1).epsilon(0.05));
}

TEST_CASE("sketches show a removed direction as removed, and the ratio within a factor") {
  const auto weight = random_weight(40, 900);
  for (const double share : {1.0, 0.7, 0.2}) {
    auto factors = removal(weight, share);
    const auto exact = ratio(factors, weight);
    const auto found = sketches({weight, factors.a}, 128, 9);
    const auto estimate = ratio({factors.b, found[1]}, found[0]);
    CHECK(estimate <= 3.3 * exact + 1e-9);
    CHECK(estimate >= exact / 3.3);
  }
}

TEST_CASE("what is removed beside a component that dwarfs it is found, also where the columns cancel it") {
  const auto weight = random_weight(30, 50);
  weight.select(1, 49).zero_();
  const auto removed = removal(weight, 1);
  auto unread = at::zeros({1, 50});
  unread.index_put_({0, 49}, 1e8);  // no input has it
  const auto any = dense::tensor(dense::gaussian(30, 1, 23));
  const auto other = any - removed.b.mm(removed.b.t().mm(any));
  const LoraFactors beside{at::cat({removed.b, other}, 1), at::cat({removed.a, unread})};
  const LoraFactors cancelled{at::cat({removed.b, -removed.b}, 1), at::cat({removed.a + unread, unread})};
  for (const auto& factors : {beside, cancelled}) {
    const auto found = sketches({weight, factors.a}, 128, 9, at::kDouble);
    CHECK(ratio(factors, weight) < 1e-4);
    CHECK(ratio({factors.b, found[1], 1}, found[0].to(at::kFloat)) < 1e-4);
  }
}

TEST_CASE("matrices of no rows or columns have the ratio 1") {
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{3, 0}, {0, 3}}) {
    CHECK(ratio({at::zeros({rows, 1}), at::zeros({1, columns})}, at::zeros({rows, columns})) == 1);
    CHECK(sketches({at::zeros({rows, columns})}, 8, 1)[0].norm().item<double>() == 0);
  }
}

TEST_CASE("what cannot be measured is refused by name") {
  const auto weight = random_weight(30, 50);
  const auto refused = [&](const LoraFactors& factors, const at::Tensor& matrix, const char* reason) {
    CHECK_THROWS_WITH_AS(annihilations({{factors, matrix, "layer"}}), doctest::Contains(reason), csulora::InputError);
  };
  refused(random_factors(30, 40, 2), weight, "layer: the update is of a [30, 40] matrix, and the weight is [30, 50]");
  refused(random_factors(30, 50, 2), weight * std::numeric_limits<float>::quiet_NaN(), "layer: the weight holds NaN");
  refused({at::full({30, 2}, kInfinity), at::ones({2, 50})}, weight, "layer: the update holds NaN or infinity");
  const auto ones = at::ones({30, 2});
  refused({ones, at::ones({2, 50}), kInfinity}, weight, "layer: the update holds NaN or infinity, or numbers whose");
  CHECK_THROWS_AS(sketches({weight}, 0, 1), csulora::InputError);
  CHECK_THROWS_AS(sketches({weight}, 8, 1, at::kHalf), csulora::InputError);
}

}  // namespace
