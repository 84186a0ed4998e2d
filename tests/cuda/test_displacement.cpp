// The device code's subtraction, emulated, against the CPU's.
#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include "gpu/displacement_device.h"

namespace {

const at::ScalarType kTypes[] = {at::kHalf, at::kBFloat16, at::kFloat};

}  // namespace

TEST_CASE("the device subtracts and measures as the CPU does") {
  at::manual_seed(0);
  for (const auto& [rows, columns] : {std::pair{1, 1}, {3, 700}, {600, 5}, {513, 300}}) {
    // Denormal numbers of every type, zeros and large numbers among the ordinary ones.
    auto weights = at::randn({rows, columns}).mul_(at::randn({rows, 1}).mul_(6).exp_()).clamp_(-3e4, 3e4);
    weights.masked_fill_(at::rand({rows, columns}) < 0.1, 0);
    const auto moved = weights + 0.01 * at::randn({rows, columns});
    for (const auto base_type : kTypes) {
      for (const auto aligned_type : kTypes) {
        const auto base = weights.to(base_type);
        const auto aligned = moved.to(aligned_type);
        const auto expected = csulora::displacement(base, aligned, std::nullopt);
        const auto found = csulora::displacement_on_device(base, aligned, std::nullopt);
        CHECK(at::equal(found.matrix, expected.matrix));
        CHECK(found.norm2 == doctest::Approx(expected.norm2).epsilon(1e-12));
        CHECK(found.noise_edge == doctest::Approx(expected.noise_edge).epsilon(1e-6));  // float32 spacings there
      }
    }
  }
}

TEST_CASE("transposed checkpoints are subtracted as they read") {
  const auto base = at::randn({40, 60}).t();
  const auto aligned = at::randn({60, 40});
  CHECK(at::equal(csulora::displacement_on_device(base, aligned, std::nullopt).matrix, aligned - base));
}

TEST_CASE("noise that is known takes the place of what the storage adds") {
  const auto weights = at::randn({40, 60});
  const auto expected = csulora::displacement(weights, weights, 0.5).noise_edge;
  CHECK(csulora::displacement_on_device(weights, weights, 0.5).noise_edge == doctest::Approx(expected));
}

TEST_CASE("what is not finite shows in the norm") {
  auto weights = at::randn({20, 20});
  weights[3][4] = std::numeric_limits<float>::quiet_NaN();
  CHECK_FALSE(std::isfinite(csulora::displacement_on_device(at::zeros({20, 20}), weights, std::nullopt).norm2));
}
