#include "correct/gram_root.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "linalg/symmetric_eigen.h"

namespace csulora {
namespace {

std::vector<double> lengths_of(const SmallMatrix& gram) {
  std::vector<double> lengths(gram.rows());
  for (int64_t i = 0; i < gram.rows(); ++i) {
    lengths[i] = std::sqrt(std::max(gram[i][i], 0.0));
  }
  return lengths;
}

/// The Gram matrix of the columns scaled to length 1; those that are nothing stay so.
SmallMatrix scaled(const SmallMatrix& gram, const std::vector<double>& lengths) {
  const int64_t n = gram.rows();
  SmallMatrix result(n, n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      result[i][j] = lengths[i] > 0 && lengths[j] > 0 ? gram[i][j] / (lengths[i] * lengths[j]) : 0;
    }
  }
  return result;
}

/// The upper triangle R with R^T R = gram, by Cholesky; nothing if a diagonal entry is not above `least`.
std::optional<SmallMatrix> triangle_of(const SmallMatrix& gram, double least) {
  const int64_t n = gram.rows();
  SmallMatrix upper(gram);
  for (int64_t i = 0; i < n; ++i) {
    double* const row = upper[i];
    std::fill_n(row, i, 0.0);
    if (!(row[i] > least * least)) {
      return std::nullopt;
    }
    const double diagonal = std::sqrt(row[i]);
    std::transform(row + i, row + n, row + i, [diagonal](double entry) { return entry / diagonal; });
    for (int64_t below = i + 1; below < n; ++below) {
      const double factor = row[below];
      std::transform(upper[below] + below, upper[below] + n, row + below, upper[below] + below,
                     [factor](double entry, double above) { return entry - factor * above; });
    }
  }
  return upper;
}

}  // namespace

SmallMatrix root_of(const SmallMatrix& gram) {
  constexpr double kIndependent = 1e-6;
  const auto lengths = lengths_of(gram);
  const auto of_unit_columns = scaled(gram, lengths);
  auto root = triangle_of(of_unit_columns, kIndependent);
  if (!root) {
    auto [values, vectors] = symmetric_eigen(of_unit_columns);
    for (int64_t i = 0; i < vectors.rows(); ++i) {
      std::for_each(vectors[i], vectors[i + 1],
                    [length = std::sqrt(std::max(values[i], 0.0))](double& entry) { entry *= length; });
    }
    root = std::move(vectors);
  }
  for (int64_t i = 0; i < root->rows(); ++i) {
    std::transform(lengths.begin(), lengths.end(), (*root)[i], (*root)[i], std::multiplies<double>());
  }
  return std::move(*root);
}

double independence(const SmallMatrix& gram) {
  const auto root = triangle_of(scaled(gram, lengths_of(gram)), 0);
  double least = root ? 1 : 0;
  for (int64_t i = 0; i < gram.rows() && root; ++i) {
    least = std::min(least, (*root)[i][i]);
  }
  return least;
}

}  // namespace csulora
