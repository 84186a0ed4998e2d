#pragma once

#include <cstdint>
#include <vector>

#include "correct/split.h"
#include "csulora/correct.h"

namespace csulora {

/// One factor F of an update as its side of the subspace shows it. The basis counts as orthonormal, which one that was
/// rounded to a storage type is to about its precision.
struct GramSide {
  SmallMatrix coordinates;  ///< (k, r) basis^T F
  SmallMatrix outside;      ///< (r, r) Gram matrix of what of F lies outside
};

GramSide gram_side(const SplitFactor& split);

/// Multiplies the first coordinates by their gains.
GramSide attenuated(GramSide side, const std::vector<double>& gains);

/// An update b a^T + U diag(added) V^T.
struct GramSides {
  GramSide b;
  GramSide a;
  std::vector<double> added = {};  ///< of the first directions
};

/// Squared norms of the four components.
Components norms2(const GramSides& update);

/// What the columns of b have to be multiplied and those of a divided by to be equally long; 1 where one is nothing.
std::vector<double> stretches(const GramSides& update);

/// Whether rounding columns of that length costs about what rounding the update would: they do not cancel.
bool rounds_well(const GramSides& update);

/// The squared norm of an update, whose components these are.
inline double total(const Components& norms2) { return norms2.aligned + norms2.left + norms2.right + norms2.off; }

/// |X - dW| for an X that differs from dW along directions only.
double distance(const GramSides& x, const GramSides& update);

/// Whether such an X may be computed in float32: the errors of either factor's columns, times the other's, are small
/// beside it. They are not where most of the update cancels or is taken away.
bool accurate_in_float(const GramSides& x, const GramSides& update);

/// An update's energy |b a^T|^2, and how much of it lies along the first directions of both sides, as many as there are
/// `left` and `right`: the mean of what is written and what is read there. Exact for any basis.
struct Energy {
  double along = 0;
  double all = 0;

  Energy& operator+=(const Energy& other) {
    along += other.along;
    all += other.all;
    return *this;
  }
};
Energy energy(const SplitFactor& b, const SplitFactor& a, int64_t left, int64_t right);

}  // namespace csulora
