#pragma once

#include <string>
#include <vector>

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

/// What the squared norms of an update's components and its undo say, without the factors.
Correction result_of(const Components& norms2, double undo, const Attenuation& attenuation);

/// @throws InputError, which begins with the label, where what was measured is NaN or infinite
void check_finite(const Correction& result, const std::string& label);

/// Whether errors of b's columns times the components of a's, and the other way round, are small beside |X|. They are
/// not where little is kept of much, or much cancels.
///
/// @param b_gram     (2r, 2r) Gram matrix of both halves of b's columns
/// @param b_errors2  (r) squared errors of the columns
bool is_accurate(const SmallMatrix& b_gram, const std::vector<double>& b_errors2, const SmallMatrix& a_gram,
                 const std::vector<double>& a_errors2, const Correction& measured, double tolerance);

/// Whether float32 holds a scale as well as it holds other numbers; it has few digits for those near 2^-149.
bool fits_float(double scale);

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
