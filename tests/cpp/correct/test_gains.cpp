#include <correct/gains.h>
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace {

using csulora::Components;
using csulora::Directions;
using csulora::Gains;
using csulora::Penalties;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// What a gain costs a component of energy e: the terms of the objective that it enters, divided by the energy.
double cost(double gain, double penalty, double energy) {
  return (gain - 1) * (gain - 1) + penalty * energy * gain * gain;
}

TEST_CASE("the closed form is the minimiser of the objective") {
  for (const double penalty : {0.0, 0.1, 1.0, 40.0, 1e6}) {
    for (const double energy : {0.0, 1e-3, 0.5, 1.0}) {
      const double gain = csulora::gain(penalty, energy);
      CHECK(gain == 1 / (1 + penalty * energy));
      for (const double other : {0.5 * gain, 0.999 * gain, 1.001 * gain, 1.0}) {
        CHECK(cost(gain, penalty, energy) <= cost(other, penalty, energy));
      }
    }
  }
}

TEST_CASE("an infinite penalty removes a component, also one without energy") {
  CHECK(csulora::gain(kInfinity, 0) == 0);
  CHECK(csulora::gain(kInfinity, 1) == 0);
}

TEST_CASE("each kind of attenuation gives its gains") {
  const Components energies{0.1, 0.2, 0.3, 0.4};
  const auto penalised = csulora::gains_for(Penalties{1, 2, 4}, energies);
  CHECK(penalised.aligned == 1 / 1.1);
  CHECK(penalised.left == 1 / (1 + 2 * (0.2 + 0.3)));
  CHECK(penalised.right == penalised.left);
  CHECK(penalised.off == 1 / (1 + 4 * 0.4));
  const auto fixed = csulora::gains_for(Gains{0.1, 0.2, 0.3, 0.4}, energies);
  CHECK((fixed.aligned == 0.1 && fixed.left == 0.2 && fixed.right == 0.3 && fixed.off == 0.4));
  CHECK(csulora::keeps_everything(csulora::gains_for(Directions{{0}, {0}, {}}, energies)));
}

TEST_CASE("the relative change is the norm of what the gains take away") {
  const Components energies{0.25, 0.25, 0.25, 0.25};
  CHECK(csulora::relative_change(csulora::kEverything, energies) == 0);
  CHECK(csulora::relative_change({0, 0, 0, 0}, energies) == 1);
  CHECK(csulora::relative_change({1, 1, 1, 0}, energies) == 0.5);
}

TEST_CASE("scaling penalties is scaling those of which the gains are the closed form") {
  const auto scaled = csulora::with_scaled_penalties({0, 0.25, 0.5, 1}, 3);
  CHECK(scaled[0] == 0);
  CHECK(scaled[1] == doctest::Approx(csulora::gain(3 * 3, 1)));  // 0.25 is the gain of penalty 3
  CHECK(scaled[2] == doctest::Approx(csulora::gain(3 * 1, 1)));
  CHECK(scaled[3] == 1);
}

}  // namespace
