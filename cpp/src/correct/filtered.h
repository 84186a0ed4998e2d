#pragma once

#include "correct/gram_sides.h"
#include "csulora/correct.h"

namespace csulora {

/// X = dW + (X' - dW) F of rank r plus the number of directions that X' changes on the left.
struct Filtered {
  at::Tensor b;         ///< (m, rank) float32 or float64; its columns are as long as the rows of a
  at::Tensor a;         ///< (rank, n)
  GramSides sides;      ///< of b a
  double distance = 0;  ///< |X - dW|
};

/// What a task with an input filter F = p q^T asks for. Nothing is decomposed: with D the directions that X' changes on
/// the left, and W' what X' reads of the update,
///
///     X = [b, U_D] ([a, 0] + [W' - a, added V_D^T - (1 - left) U_D^T b W'] F),    W' = a (I - V (1 - right) V^T).
///
/// `directions` are the task's, with the gains that this update gets, and `update` its sides.
Filtered filtered(const CorrectionTask& task, const Directions& directions, const GramSides& update,
                  at::ScalarType dtype);

}  // namespace csulora
