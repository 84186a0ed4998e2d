// The Krylov space of a bfloat16 copy, and what refines it: where such products are slow, nothing else comes this way.
#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include <limits>

#include "dense.h"
#include "extract/decomposition.h"
#include "linalg/products.h"

namespace {

using at::Tensor;

constexpr double kFloatSums = 1e-6;  // of a few hundred terms

/// A matrix with singular values 1, 1/2, 1/3, ...
Tensor falling(int64_t rows, int64_t columns) {
  const auto shorter = std::min(rows, columns);
  const auto u = dense::tensor(dense::orthonormal(rows, shorter, 1), at::kDouble);
  const auto v = dense::tensor(dense::orthonormal(columns, shorter, 2), at::kDouble);
  return u.div(at::arange(1, shorter + 1, at::kDouble)).matmul(v.t()).to(at::kFloat);
}

csulora::TargetCount always(int64_t count) {
  return [count](const Tensor&) { return count; };
}

/// The largest |A v - s u| / s and |A^T u - s v| / s, in float64.
double residual(const Tensor& matrix, const csulora::SingularTriples& found) {
  const auto a = matrix.to(at::kDouble), u = found.u.to(at::kDouble), v = found.v.to(at::kDouble);
  const auto left = a.matmul(v).sub(u * found.s).norm(2, 0);
  const auto right = a.t().matmul(u).sub(v * found.s).norm(2, 0);
  return at::maximum(left, right).div(found.s).max().item<double>();
}

}  // namespace

TEST_CASE("a product with a bfloat16 matrix rounds its rows and sums in float32") {
  at::manual_seed(2);
  const auto matrix = at::randn({70, 130}).to(at::kBFloat16);
  for (const auto& side : {matrix, matrix.t()}) {
    const auto rows = at::randn({9, side.size(0)});
    auto product = at::empty({9, side.size(1)});
    csulora::multiply(product, rows, side);
    const auto expected = rows.to(at::kBFloat16).to(at::kDouble).matmul(side.to(at::kDouble));
    CHECK(product.sub(expected).norm().item<double>() <= kFloatSums * expected.norm().item<double>());
  }
}

TEST_CASE("a product is summed in float64 where that is asked for") {
  at::manual_seed(2);
  const auto matrix = at::randn({3001, 70});
  // Contiguous, the transpose of that, and neither. Equal terms, whose rounding adds up, too.
  for (const auto& side : {matrix, matrix.t(), matrix.narrow(1, 1, 60), at::full({5000, 3}, 0.1F)}) {
    const auto rows = at::linspace(0.1, 0.2, 9).expand({side.size(0), 9}).contiguous().t();
    const auto expected = rows.to(at::kDouble).matmul(side.to(at::kDouble));
    const auto scale = rows.to(at::kDouble).matmul(side.to(at::kDouble).abs());
    for (const auto& [type, terms] : {std::pair{at::kDouble, csulora::kFloatTerms}, {at::kFloat, side.size(0)}}) {
      auto product = at::full({9, side.size(1)}, 7, type);
      csulora::multiply(product, rows, side);
      const double rounding = std::numeric_limits<float>::epsilon() / 2 * static_cast<double>(terms);
      CHECK(product.sub(expected).abs().div(scale).max().item<double>() <= rounding);
    }
  }
}

TEST_CASE("what a bfloat16 copy finds is refined to the tolerance") {
  for (const auto& [rows, columns] : {std::pair{300, 260}, std::pair{220, 320}}) {
    const auto matrix = falling(rows, columns);
    for (const auto& [block, tolerance] :
         {std::pair<int64_t, double>{22, 1e-2}, {22, 1e-3}, {22, 1e-5}, {34, 1e-2}, {34, 1e-5}}) {
      CAPTURE(block);
      CAPTURE(tolerance);
      const auto found = csulora::low_precision_block_krylov(matrix, matrix.to(at::kBFloat16), always(6),
                                                             {block, 6, {tolerance, 0}, 3});
      REQUIRE(found);
      CHECK(residual(matrix, *found) <= tolerance);
      CHECK(found->u.sizes() == at::IntArrayRef{rows, 6});
      CHECK(found->v.sizes() == at::IntArrayRef{columns, 6});
      CHECK(found->u.t().mm(found->u).sub(at::eye(6)).abs().max().item<double>() <= 1e-5);
      for (int64_t i = 0; i < 6; ++i) {
        CHECK(found->s[i].item<double>() == doctest::Approx(1.0 / static_cast<double>(i + 1)).epsilon(tolerance));
      }
      const double next = found->upper[6].item<double>();
      CHECK(next >= 1.0 / 7 * (1 - 1e-6));
      CHECK(next <= 1.1 / 7);
    }
  }
}

TEST_CASE("of a block with few targets, few vectors are refined, and their values exceed none") {
  const auto matrix = falling(300, 260);
  const auto found =
      csulora::low_precision_block_krylov(matrix, matrix.to(at::kBFloat16), always(2), {40, 3, {1e-3, 0}, 3});
  REQUIRE(found);
  CHECK(residual(matrix, *found) <= 1e-3);
  REQUIRE(found->computed.size(0) == 18);
  const auto values = at::arange(1, 19, at::kDouble).reciprocal();
  CHECK(found->computed.div(values).max().item<double>() <= 1 + 1e-6);
}

TEST_CASE("no direction is found twice where values repeat or there are few") {
  constexpr double kTolerance = 1e-3;
  for (const int64_t directions : {5, 21, 22, 23, 60}) {
    CAPTURE(directions);
    const auto u = dense::tensor(dense::orthonormal(300, directions, 1), at::kFloat);
    const auto v = dense::tensor(dense::orthonormal(260, directions, 2), at::kFloat);
    const auto matrix = u.matmul(v.t());  // singular values 1
    const auto found =
        csulora::low_precision_block_krylov(matrix, matrix.to(at::kBFloat16), always(5), {22, 5, {kTolerance, 0}, 3});
    REQUIRE(found);
    CHECK(residual(matrix, *found) <= kTolerance);
    CHECK(found->u.t().mm(found->u).sub(at::eye(5)).abs().max().item<double>() <= 1e-5);
    CHECK(found->v.t().mm(found->v).sub(at::eye(5)).abs().max().item<double>() <= 1e-2);
    CHECK(found->s.sub(1).abs().max().item<double>() <= kTolerance);
    CHECK(found->upper[5].item<double>() >= (directions > 5 ? 1 - kTolerance : 0));
  }
  const auto none = at::zeros({300, 260});
  CHECK_FALSE(
      csulora::low_precision_block_krylov(none, none.to(at::kBFloat16), always(5), {22, 5, {kTolerance, 0}, 3}));
}

TEST_CASE("a start or digits that do not suffice are said") {
  at::manual_seed(3);
  const auto matrix = falling(300, 260);
  const auto low_precision = matrix.to(at::kBFloat16);
  CHECK_FALSE(csulora::refine(matrix, low_precision, at::randn({8, 300}), always(6), {1e-4, 0}));
  CHECK_FALSE(csulora::refine(matrix, low_precision, at::randn({22, 300}), always(6), {1e-8, 0}));
  CHECK_FALSE(csulora::low_precision_block_krylov(matrix, low_precision, always(6), {22, 6, {1e-8, 0}, 3}));
}
