#pragma once

#include "csulora/correct.h"

namespace csulora {

/// Whether an update has more columns than its matrix has rows or columns: such factors say nothing that fewer would
/// not, and what follows takes time that grows with the cube of their number.
bool is_wide(const LoraFactors& factors);

/// A wide update in as many columns as its matrix has rows or columns, whichever are fewer: one factor is diagonal, and
/// the columns of b are as long as the rows of a. Both are float64, on a GPU float32; the scale is 1.
LoraFactors thinned(const LoraFactors& factors);

}  // namespace csulora
