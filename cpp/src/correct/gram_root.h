#pragma once

#include "linalg/small_matrix.h"

namespace csulora {

/// root^T root = gram for a Gram matrix, which must be finite, from that of the columns scaled to length 1, so that
/// short columns keep their digits. By eigenvalues where Cholesky's factor would say nothing of columns that depend on
/// others.
SmallMatrix root_of(const SmallMatrix& gram);

/// How far the columns of a Gram matrix are from depending on one another: the shortest distance of one, scaled to
/// length 1, from the span of those before it. 0 where there is none, or a column is nothing.
double independence(const SmallMatrix& gram);

}  // namespace csulora
