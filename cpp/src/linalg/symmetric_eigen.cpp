#include "linalg/symmetric_eigen.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

#include "linalg/widest_vectors.h"
#include "runtime/check.h"

namespace csulora {
namespace {

/// What counts as 0 beside a largest entry of 1: squares of less lose digits, or are 0.
constexpr double kNothing = 1e-100;

/// target += factor source.
CSULORA_INLINED void add(double factor, const double* source, int64_t count, double* __restrict target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] += factor * source[i];
  }
}

/// Turns two rows by an angle of that cosine and sine.
CSULORA_INLINED void rotate(double cosine, double sine, int64_t count, double* __restrict upper,
                            double* __restrict lower) {
  for (int64_t i = 0; i < count; ++i) {
    const double above = upper[i], below = lower[i];
    upper[i] = cosine * above - sine * below;
    lower[i] = sine * above + cosine * below;
  }
}

/// A symmetric matrix (n, n) becomes (I - scale v v^T) matrix (I - scale v v^T), whose first row has nothing but two
/// entries. Returns the second of them and the scale; v is written in its place and right of it.
struct Reflect {
  template <int kLanes>
  CSULORA_INLINED static std::pair<double, double> run(double* matrix, int64_t n, int64_t stride, double* products) {
    double* const v = matrix + 1;
    const int64_t count = n - 1;
    const double length = std::sqrt(std::inner_product(v, v + count, v, 0.0));
    if (length < kNothing) {
      return {0, 0};
    }
    const double entry = v[0] > 0 ? -length : length;
    v[0] -= entry;
    const double scale = -1 / (entry * v[0]);  // 2 / |v|^2
    double* const rest = matrix + stride + 1;
    std::fill_n(products, count, 0.0);
    for (int64_t i = 0; i < count; ++i) {
      add(scale * v[i], rest + i * stride, count, products);
    }
    add(-scale / 2 * std::inner_product(v, v + count, products, 0.0), v, count, products);
    for (int64_t i = 0; i < count; ++i) {
      add(-v[i], products, count, rest + i * stride);
      add(-products[i], v, count, rest + i * stride);
    }
    return {entry, scale};
  }
};

/// rows (count, n) becomes (I - scale v v^T) rows.
struct ReflectRows {
  template <int kLanes>
  CSULORA_INLINED static void run(double scale, const double* v, int64_t count, int64_t stride, double* rows,
                                  double* products) {
    std::fill_n(products, count, 0.0);
    for (int64_t i = 0; i < count; ++i) {
      add(scale * v[i], rows + i * stride, count, products);
    }
    for (int64_t i = 0; i < count; ++i) {
      add(-v[i], products, count, rows + i * stride);
    }
  }
};

/// One implicit QL step with Wilkinson's shift on rows [first, last] of a tridiagonal matrix, applied to the rows of
/// `vectors` (., n) too.
struct StepQl {
  template <int kLanes>
  CSULORA_INLINED static void run(double* diagonal, double* beside, int64_t first, int64_t last, int64_t n,
                                  double* vectors) {
    const double half = (diagonal[first + 1] - diagonal[first]) / (2 * beside[first]);
    const double root = std::copysign(std::sqrt(half * half + 1), half);
    double turned = diagonal[last] - diagonal[first] + beside[first] / (half + root);
    double sine = 1, cosine = 1, shifted = 0;
    for (int64_t i = last - 1; i >= first; --i) {
      const double outer = sine * beside[i], inner = cosine * beside[i];
      const double length = std::sqrt(outer * outer + turned * turned);
      beside[i + 1] = length;
      if (length < kNothing) {  // the matrix falls into two
        diagonal[i + 1] -= shifted;
        beside[last] = 0;
        return;
      }
      sine = outer / length;
      cosine = turned / length;
      const double lower = diagonal[i + 1] - shifted;
      const double change = (diagonal[i] - lower) * sine + 2 * cosine * inner;
      shifted = sine * change;
      diagonal[i + 1] = lower + shifted;
      turned = cosine * change - inner;
      rotate(cosine, sine, n, vectors + i * n, vectors + (i + 1) * n);
    }
    diagonal[first] -= shifted;
    beside[first] = turned;
    beside[last] = 0;
  }
};

/// matrix = vectors^T T vectors, for T of this diagonal, and of these entries beside it.
struct Tridiagonal {
  explicit Tridiagonal(SmallMatrix matrix) : diagonal(matrix.rows()), beside(matrix.rows()), vectors() {
    const int64_t n = matrix.rows();
    std::vector<double> scales(n), products(n);
    for (int64_t i = 0; i + 2 < n; ++i) {
      std::tie(beside[i], scales[i]) = run_widest<Reflect>(matrix[i] + i, n - i, n, products.data());
    }
    if (n > 1) {
      beside[n - 2] = matrix[n - 2][n - 1];
    }
    SmallMatrix reflections(n, n);
    for (int64_t i = n - 1; i >= 0; --i) {
      diagonal[i] = matrix[i][i];
      reflections[i][i] = 1;
      if (i + 2 < n) {
        run_widest<ReflectRows>(scales[i], matrix[i] + i + 1, n - i - 1, n, reflections[i + 1] + i + 1,
                                products.data());
      }
    }
    vectors = transposed(reflections);
  }

  std::vector<double> diagonal;
  std::vector<double> beside;  ///< (n) the last one is nothing
  SmallMatrix vectors;
};

void make_diagonal(Tridiagonal& matrix) {
  constexpr int kSteps = 60;
  auto& [diagonal, beside, vectors] = matrix;
  const auto n = static_cast<int64_t>(diagonal.size());
  for (int64_t first = 0, step = 0; first < n;) {
    int64_t last = first;
    while (last + 1 < n && std::abs(beside[last]) > std::numeric_limits<double>::epsilon()) {
      ++last;
    }
    if (last == first) {
      ++first;
      step = 0;
      continue;
    }
    check_internal(step++ < kSteps, "the eigenvalues of a small matrix do not converge");
    run_widest<StepQl>(diagonal.data(), beside.data(), first, last, n, vectors[0]);
  }
}

/// Divides by the largest magnitude, which it returns.
double scale_to_one(SmallMatrix& matrix) {
  double* const end = matrix[matrix.rows()];
  double largest = 0;
  std::for_each(matrix[0], end, [&](double entry) { largest = std::max(largest, std::abs(entry)); });
  if (largest > 0) {
    std::for_each(matrix[0], end, [=](double& entry) { entry /= largest; });
  }
  return largest;
}

SymmetricEigen by_lapack(const SmallMatrix& matrix) {
  const auto [values, vectors] = at::linalg_eigh(matrix.tensor());  // from the smallest on
  const auto largest_first = values.flip(0);
  const auto* const first = largest_first.const_data_ptr<double>();
  return {{first, first + matrix.rows()}, SmallMatrix(vectors.t().flip(0))};
}

SymmetricEigen by_ql(SmallMatrix matrix) {
  const int64_t n = matrix.rows();
  const double largest = scale_to_one(matrix);
  Tridiagonal reduced(std::move(matrix));
  make_diagonal(reduced);
  const auto& diagonal = reduced.diagonal;
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t one, int64_t other) { return diagonal[one] > diagonal[other]; });
  SymmetricEigen result{{}, {n, n}};
  for (int64_t i = 0; i < n; ++i) {
    result.values.push_back(largest * diagonal[order[i]]);
    std::copy_n(reduced.vectors[order[i]], n, result.vectors[i]);
  }
  return result;
}

}  // namespace

SymmetricEigen symmetric_eigen(SmallMatrix matrix) {
  constexpr int64_t kMost = 64;  // rows; LAPACK is faster with more
  return matrix.rows() > kMost ? by_lapack(matrix) : by_ql(std::move(matrix));
}

}  // namespace csulora
