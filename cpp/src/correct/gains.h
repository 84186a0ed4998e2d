#pragma once

#include <vector>

#include "csulora/correct.h"

/// The closed form of the closest safe update (CSULoRA, arXiv 2605.30640). With penalties lambda_c >= 0 and the
/// relative energies e_c = |dW_c|^2 / |dW|^2 of an update's components,
///
///     argmin_X |X - dW|^2 + sum_c lambda_c e_c |X_c|^2 = sum_c g_c dW_c,    g_c = 1 / (1 + lambda_c e_c),
///
/// over c = aligned, partial (left and right together) and off. The components are orthogonal, so each has its own
/// minimum.
namespace csulora {

inline constexpr Gains kEverything{1, 1, 1, 1};

/// Whether X = dW.
bool keeps_everything(const Gains& gains);

/// g = 1 / (1 + penalty * energy), the minimiser of (g - 1)^2 + penalty * energy * g^2; 0 for an infinite penalty,
/// whatever the energy.
double gain(double penalty, double energy);

/// The gains of an update's components, by the kind of attenuation:
/// - Penalties: the closed form, where left and right share the gain of their summed energy;
/// - Gains: as they are;
/// - Directions: kEverything, since what is kept there does not follow from energies of components.
Gains gains_for(const Attenuation& attenuation, const Components& energies);

/// |X - dW| / |dW| = sqrt(sum_c (1 - g_c)^2 e_c).
double relative_change(const Gains& gains, const Components& energies);

/// Gains whose penalties (1 - g) / g are multiplied by a scale; 0 and 1 stay as they are.
std::vector<double> with_scaled_penalties(std::vector<double> gains, double penalty_scale);

}  // namespace csulora
