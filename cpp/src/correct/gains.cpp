#include "correct/gains.h"

#include <algorithm>
#include <cmath>

namespace csulora {

bool keeps_everything(const Gains& gains) {
  return gains.aligned == 1 && gains.left == 1 && gains.right == 1 && gains.off == 1;
}

double gain(double penalty, double energy) { return std::isinf(penalty) ? 0 : 1 / (1 + penalty * energy); }

Gains gains_for(const Attenuation& attenuation, const Components& energies) {
  if (const auto* gains = std::get_if<Gains>(&attenuation)) {
    return *gains;
  }
  const auto* penalties = std::get_if<Penalties>(&attenuation);
  if (!penalties) {
    return kEverything;
  }
  const double partial = gain(penalties->partial, energies.left + energies.right);
  return {gain(penalties->aligned, energies.aligned), partial, partial, gain(penalties->off, energies.off)};
}

double relative_change(const Gains& gains, const Components& energies) {
  const auto removed = [](double g, double energy) { return (1 - g) * (1 - g) * energy; };
  return std::sqrt(removed(gains.aligned, energies.aligned) + removed(gains.left, energies.left) +
                   removed(gains.right, energies.right) + removed(gains.off, energies.off));
}

double penalty_scale(double energy, double reference_energy) {
  return std::max(std::pow(energy / reference_energy, 2), kLeastPenaltyScale);
}

std::vector<double> with_scaled_penalties(std::vector<double> gains, double penalty_scale) {
  std::transform(gains.begin(), gains.end(), gains.begin(), [penalty_scale](double gain) {
    return gain > 0 && gain < 1 ? gain / (gain + (1 - gain) * penalty_scale) : gain;
  });
  return gains;
}

}  // namespace csulora
