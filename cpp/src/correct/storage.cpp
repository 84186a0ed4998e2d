#include "correct/storage.h"

#include <ATen/ATen.h>

#include <limits>

#include "runtime/check.h"

namespace csulora {
namespace {

using at::Tensor;

double largest(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return std::numeric_limits<at::Half>::max();
    case at::kBFloat16:
      return std::numeric_limits<at::BFloat16>::max();
    default:
      return std::numeric_limits<float>::max();
  }
}

}  // namespace

Tensor widened(const Tensor& matrix, at::ScalarType dtype) {
  if (matrix.scalar_type() == at::kDouble) {
    return matrix.to(dtype);
  }
  return matrix.to(at::kFloat).to(dtype);  // at once, float16 to float64 takes five times as long
}

LoraFactors stored(const Tensor& b, const Tensor& a, const CorrectionTask& task) {
  const auto round = [&](const Tensor& factor, const Tensor& replaced) {
    const auto dtype = replaced.scalar_type();
    const auto [least, most] = at::aminmax(factor);  // NaN if one entry is
    const bool fits = least.item<double>() >= -largest(dtype) && most.item<double>() <= largest(dtype);
    check_fits(fits, dtype, task.label);
    return factor.to(dtype).contiguous();
  };
  return {round(b, task.factors.b), round(a, task.factors.a)};
}

}  // namespace csulora
