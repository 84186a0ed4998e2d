#pragma once

#include <string>

#include "correct/split.h"
#include "csulora/correct.h"

namespace csulora {

/// What rounding in float32 may cost, relative to |X|.
inline constexpr double kFloatTolerance = 5e-6;

/// What the splits of both factors say of an update.
struct Measured {
  SplitFactor b;      ///< of b times the scale
  SplitFactor a;      ///< of the transpose of a
  Correction result;  ///< without its factors; with the gains that are asked for, all 1 along directions
};

/// Splits and measures a checked update: in float32 where that is accurate enough for the gains, else, on a
/// GPU, and where its factors are float64, in float64. Columns in float32 lie in memory of the calling thread, until it
/// measures another.
///
/// @param label  what error messages call the update
/// @throws InputError where values are not finite or too large
Measured measured(const LoraFactors& factors, const Subspace& subspace, const Attenuation& attenuation,
                  const std::string& label);

/// The same for the update of a task.
inline Measured measured(const CorrectionTask& task) {
  return measured(task.factors, task.subspace, task.attenuation, task.label);
}

}  // namespace csulora
