#pragma once

#include "correct/split.h"
#include "csulora/correct.h"

namespace csulora {

inline constexpr Gains kEverything{1, 1, 1, 1};

/// What rounding in float32 may cost, relative to |X|.
inline constexpr double kFloatTolerance = 5e-6;

/// What the splits of both factors say of an update.
struct Measured {
  SplitFactor b;      ///< of the task's b times its scale
  SplitFactor a;      ///< of the transpose of its a
  Correction result;  ///< without its factors; with the gains that the task asks for, all 1 along directions
};

/// Splits and measures the update of a checked task: in float32 where that is accurate enough for the gains, else, on a
/// GPU, and where its factors are float64, in float64. Columns in float32 lie in memory of the calling thread, until it
/// measures another.
///
/// @throws InputError where values are not finite or too large
Measured measured(const CorrectionTask& task);

}  // namespace csulora
