#pragma once

#include <vector>

#include "csulora/correct.h"

namespace csulora {

/// Throws InputError for what correct() cannot take; of values, only gains, penalties and scales are looked at.
void check_tasks(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options);

}  // namespace csulora
