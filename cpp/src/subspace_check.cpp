#include "subspace_check.h"

#include <ATen/ATen.h>

#include "runtime/check.h"

namespace csulora {

void check_factors(const Subspace& subspace, const std::string& where) {
  const auto& [u, s, v, certificate] = subspace;
  check_matrix(u, where + "u");
  check_matrix(v, where + "v");
  check(u.scalar_type() == v.scalar_type(), where, "u is ", c10::toString(u.scalar_type()), " and v is ",
        c10::toString(v.scalar_type()), "; both must have one dtype");
  check(s.defined() && s.dim() == 1 && s.scalar_type() == at::kFloat, where, "s must be a float32 vector");
  check_same_device(s, u, where + "s");
  check_same_device(v, u, where + "v");
  check(u.size(1) == s.size(0) && v.size(1) == s.size(0), where, "u is ", u.sizes(), ", s ", s.sizes(), ", v ",
        v.sizes(), "; they must agree on the number of directions");
}

}  // namespace csulora
