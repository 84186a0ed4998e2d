#include "extract/noise_edge.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>
#include <utility>

namespace csulora {
namespace {

using Variances = std::vector<double>;

double largest(const Variances& variances) { return *std::max_element(variances.begin(), variances.end()); }

/// t(s) = sum_j b_j / (1 - s b_j).
double t_of(double s, const Variances& b) {
  return std::transform_reduce(b.begin(), b.end(), 0.0, std::plus<>(), [=](double b_j) { return b_j / (1 - s * b_j); });
}

/// The z > t max a with s = sum_i a_i / (z - a_i t). The sum falls and is convex, so that Newton's method climbs to it
/// from where its largest term alone is s.
double z_of(double s, double t, const Variances& a) {
  constexpr int kMaxSteps = 60;
  constexpr double kAccuracy = 1e-9;
  double z = largest(a) * (t + 1 / s);
  for (int step = 0; step < kMaxSteps; ++step) {
    double sum = 0, slope = 0;
    for (const double a_i : a) {
      const double inverse = 1 / (z - a_i * t);
      sum += a_i * inverse;
      slope += a_i * inverse * inverse;
    }
    const double ahead = (sum - s) / slope;
    z += ahead;
    if (ahead <= kAccuracy * z) {
      break;
    }
  }
  return z;
}

double sum_of(const Variances& variances) { return std::accumulate(variances.begin(), variances.end(), 0.0); }

/// The variances that are not zero, with the sum sqrt(total).
Variances normalised(const Variances& variances, double total) {
  Variances result;
  std::copy_if(variances.begin(), variances.end(), std::back_inserter(result), [](double v) { return v > 0; });
  const double scale = std::sqrt(total) / sum_of(variances);
  std::transform(result.begin(), result.end(), result.begin(), [=](double v) { return v * scale; });
  return result;
}

/// The largest error of an entry, a spacing, of which no variance is less than a twelfth of the square. It reaches the
/// edge only if few rows and few columns have all that matters.
double largest_entry(const Variances& rows, const Variances& columns) {
  const double total = std::max(sum_of(rows), sum_of(columns));
  return total == 0 ? 0 : std::sqrt(12 * largest(rows) * largest(columns) / total);
}

}  // namespace

double spectral_edge(const Variances& rows, const Variances& columns) {
  const double total = std::max(sum_of(rows), sum_of(columns));
  if (total == 0) {
    return 0;
  }
  auto a = normalised(rows, total), b = normalised(columns, total);
  if (a.size() > b.size()) {
    std::swap(a, b);  // the edge is the transpose's, and sums over a are many
  }
  const auto z = [&](double s) { return z_of(s, t_of(s, b), a); };
  constexpr double kGolden = 0.6180339887498949;
  constexpr int kSteps = 24;  // narrow the bracket to 1e-5 of itself; the minimum is flat
  double low = 0, high = 1 / largest(b);
  double left = high - kGolden * (high - low), right = low + kGolden * (high - low);
  double z_left = z(left), z_right = z(right);
  for (int step = 0; step < kSteps; ++step) {
    if (z_left < z_right) {
      high = right, right = left, z_right = z_left;
      left = high - kGolden * (high - low), z_left = z(left);
    } else {
      low = left, left = right, z_left = z_right;
      right = low + kGolden * (high - low), z_right = z(right);
    }
  }
  return std::sqrt(std::min(z_left, z_right));
}

double rounding_variance(const RoundingSums& sums) {
  if (sums.near == 0) {
    return sums.variances;
  }
  const double q = std::min(sums.stepped / sums.near, 0.5);
  return sums.variances + std::max(q * (1 - q), 1.0 / 12) * sums.near;
}

double noise_edge(const Variances& row_variances, const Variances& column_variances) {
  // The largest singular value of a finite matrix leaves the edge by about size^(-2/3) of it (Tracy & Widom 1996),
  // and entries of quantised weights share their place between two numbers with others; twice that covers both.
  const auto shorter = static_cast<double>(std::min(row_variances.size(), column_variances.size()));
  const double edge = (1 + 2 * std::pow(shorter, -2.0 / 3)) * spectral_edge(row_variances, column_variances);
  return std::max(edge, largest_entry(row_variances, column_variances));
}

}  // namespace csulora
