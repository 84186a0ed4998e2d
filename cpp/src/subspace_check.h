#pragma once

#include <string>

#include "csulora/subspace.h"

namespace csulora {

/// Throws InputError, its message beginning with `where`, unless u (m, k), s (k) and v (n, k) fit each other. Values
/// are not looked at.
void check_factors(const Subspace& subspace, const std::string& where);

}  // namespace csulora
