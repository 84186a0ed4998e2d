#pragma once

#include <vector>

#include "csulora/correct.h"

namespace csulora {

/// Whether a task says what to keep along single directions.
bool attenuates_directions(const CorrectionTask& task);

/// correct() for checked tasks all of which do. A task's factors are split once, for energies and coordinates, from
/// which all figures of X follow, and read again for X itself; only a rank below that of X, or columns that all but
/// cancel, take another split.
std::vector<Correction> correct_along(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options);

}  // namespace csulora
