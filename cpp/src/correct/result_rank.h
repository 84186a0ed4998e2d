#pragma once

#include <algorithm>
#include <cstdint>

#include "csulora/correct.h"
#include "csulora/error.h"

namespace csulora {

/// Whether X = (g B_in + g' B_out) (h A_in + h' A_out), of rank r like the update itself.
inline bool gains_factor(const Gains& gains) { return gains.aligned * gains.off == gains.left * gains.right; }

/// The rank to emit for an update of rank `rank` whose X has rank `exact`, `rank` or twice that.
inline int64_t result_rank(const CorrectionOptions& options, int64_t exact, int64_t rank) {
  switch (options.rule) {
    case RankRule::keep:
      return rank;
    case RankRule::fixed:
      return std::min(options.rank, exact);
    case RankRule::exact:
      return exact;
  }
  throw InternalError("unknown rank rule");
}

/// The rank of X for an update of rank `rank` of a matrix whose shorter side is `shorter`, which is not below it.
inline int64_t exact_rank(const Gains& gains, int64_t rank, int64_t shorter) {
  return gains_factor(gains) ? rank : std::min(2 * rank, shorter);
}

}  // namespace csulora
