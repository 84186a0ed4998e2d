// The example in csulora/csulora.h, letter by letter; that header is all of csulora that a program includes.
#include "example.h"

#include <iostream>

csulora::LoraFactors closest_safe(const at::Tensor& base, const at::Tensor& aligned,
                                  const csulora::LoraFactors& update) {
  csulora::ExtractOptions options;
  options.rank = 8;
  const csulora::Subspace subspace = csulora::extract_subspace(base, aligned, options);

  const csulora::Penalties penalties{.aligned = 0, .partial = 1, .off = 1};
  const csulora::Correction result = csulora::correct({update, subspace, penalties, "q_proj"});
  std::cout << "undo " << result.undo << " -> " << result.undo_after << '\n';
  return result.factors;
}
