#include "correct/storage.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "linalg/conversion.h"
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

/// A factor rounded to a storage type, contiguous, and its largest magnitude before; NaN if one entry is.
std::pair<Tensor, double> rounded(const Tensor& factor, at::ScalarType dtype) {
  if (factor.is_cpu() && factor.scalar_type() == at::kFloat && factor.stride(1) == 1 && dtype != at::kDouble) {
    auto result = at::empty(factor.sizes(), factor.options().dtype(dtype));
    const MatrixView<const float> entries{factor.const_data_ptr<float>(), factor.size(0), factor.size(1),
                                          factor.stride(0)};
    const float largest = narrow(entries, dtype, result.mutable_data_ptr(), result.stride(0));
    return {result, largest};
  }
  const auto [least, most] = at::aminmax(factor);
  return {factor.to(dtype).contiguous(), std::max(-least.item<double>(), most.item<double>())};
}

}  // namespace

Tensor widened(const Tensor& matrix, at::ScalarType dtype) {
  if (matrix.scalar_type() == at::kDouble) {
    return matrix.to(dtype);
  }
  return matrix.to(at::kFloat).to(dtype);  // at once, float16 to float64 takes five times as long
}

void check_stored(double magnitude, at::ScalarType dtype, const std::string& label) {
  check_fits(magnitude <= largest(dtype), dtype, label);
}

LoraFactors stored(const Tensor& b, const Tensor& a, const CorrectionTask& task) {
  const auto round = [&](const Tensor& factor, const Tensor& replaced) {
    const auto dtype = replaced.scalar_type();
    const auto [result, most] = rounded(factor, dtype);
    check_stored(most, dtype, task.label);
    return result;
  };
  return {round(b, task.factors.b), round(a, task.factors.a)};
}

}  // namespace csulora
