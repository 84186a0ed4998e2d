#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "csulora/correct.h"

namespace csulora {

/// An update and the matrix that it is added to.
struct AnnihilationTask {
  LoraFactors factors;
  at::Tensor weight;             ///< W (m, n) float16, bfloat16 or float32, on the CPU as the factors are
  std::string label = "update";  ///< what error messages call it
};

/// What an update leaves of the direction that it removes most of.
struct Annihilation {
  double ratio = 1;  ///< 1 for an update of nothing, and for one that only writes where the matrix writes nothing
  int64_t rank = 0;  ///< dimensions of the column space of dW
};

/// min |u^T (W + dW)|^2 / |u^T W|^2 over all u in the column space of dW, in float64 and without the product b a:
/// O(m n r) operations and a read of W. It is near 0 where an update removes a direction from what the matrix writes.
/// In parallel over tasks; results do not depend on the number of threads.
///
/// Of sketches of a and W, both with the same columns and seed, it is an estimate, see sketches(). What an update
/// removes wholly is 0 there too. The sketch of a may be float64, and should be for updates that nobody has checked.
///
/// @throws InputError for shapes, dtypes, devices or values (NaN, infinity) that cannot be used; the message names
///         `task.label`
std::vector<Annihilation> annihilations(const std::vector<AnnihilationTask>& tasks);

/// M G / sqrt(columns) of every matrix M (m, n), (m, columns). G (n, columns) are independent Gaussian numbers
/// that depend on the seed, their row and their column alone, so |x^T G|^2 / columns is about |x|^2.
///
/// @param matrices  float16, bfloat16 or float32, on the CPU
/// @param dtype  of the results and in which they are summed, float32 or float64: rounding to float32 hides what an
///               update removes if its columns all but cancel
/// @throws InputError for anything else, and for fewer than 1 column
std::vector<at::Tensor> sketches(const std::vector<at::Tensor>& matrices, int64_t columns, uint64_t seed,
                                 at::ScalarType dtype = at::kFloat);

}  // namespace csulora
