#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include "correct/cases.h"
#include "example.h"

namespace {

TEST_CASE("the header's example makes an update smaller outside the subspace and keeps it inside") {
  const auto subspace = cases::random_subspace(64, 48, 8);
  const auto base = dense::tensor(dense::gaussian(64, 48, 1));
  const auto aligned = base + (subspace.u * subspace.s).matmul(subspace.v.t());
  const auto update = cases::random_factors(64, 48, 4);
  const auto corrected = closest_safe(base, aligned, update);
  CHECK(corrected.scale == 1);
  CHECK(norm(cases::update(corrected)) < norm(cases::update(update)));
  const auto inside = [&](const csulora::LoraFactors& factors) {
    const auto dw = factors.b.matmul(factors.a) * factors.scale;
    return subspace.u.t().matmul(dw).matmul(subspace.v);
  };
  CHECK((inside(corrected) - inside(update)).norm().item<double>() < 0.1 * inside(update).norm().item<double>());
}

}  // namespace
