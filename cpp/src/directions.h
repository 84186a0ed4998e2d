#pragma once

#include <vector>

#include "csulora/correction.h"

namespace csulora {

/// Whether a task says what to keep along single directions.
bool attenuates_directions(const CorrectionTask& task);

/// correct() for tasks some of which do: such an X is made first, and then measured and cut to a rank as an update that
/// all is kept of.
std::vector<Correction> correct_with_directions(const std::vector<CorrectionTask>& tasks,
                                                const CorrectionOptions& options);

}  // namespace csulora
