#include "correct/undo.h"

#include <ATen/ATen.h>

#include <numeric>

namespace csulora {

double undo(const SmallMatrix& b, const SmallMatrix& a, const at::Tensor& s, const std::vector<double>& added) {
  const SmallMatrix values(s.unsqueeze(0));
  double overlap = 0, alignment2 = 0;  // <X, U S V^T> and |S|^2
  for (int64_t i = 0; i < values.columns(); ++i) {
    const double value = values[0][i];
    overlap += value * std::inner_product(b[i], b[i] + b.columns(), a[i], 0.0);
    alignment2 += value * value;
  }
  for (size_t i = 0; i < added.size(); ++i) {
    overlap += values[0][i] * added[i];
  }
  return alignment2 == 0 ? 0 : -overlap / alignment2;
}

}  // namespace csulora
