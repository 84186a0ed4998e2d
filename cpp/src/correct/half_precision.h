#pragma once

#include <optional>

#include "csulora/correct.h"

namespace csulora {

/// X for a task whose factors are stored in 16 bits, in about half the time that other updates take. Each factor is
/// read twice, for what it is and for what it becomes, and nothing of its length is kept in between.
///
/// The basis counts as orthonormal, which one that was rounded is to about its precision: the halves of each factor are
/// taken to be orthogonal. Energies are off by that much, X by less than rounding it to its type costs.
///
/// @return nothing if the factors are stored otherwise, or if too little lies outside the subspace for that
std::optional<Correction> correct_half_precision(const CorrectionTask& task, const CorrectionOptions& options);

}  // namespace csulora
