#include "correct/filtered.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "correct/storage.h"

namespace csulora {
namespace {

using at::Tensor;

/// As it is computed with beside tall matrices: float64, on the CPU.
Tensor small(const Tensor& matrix) { return matrix.to(at::kCPU, at::kDouble); }

/// `numbers` and as many of `rest` as make `count`, as a column.
Tensor column(std::vector<double> numbers, int64_t count, double rest) {
  numbers.resize(count, rest);
  return at::tensor(numbers, at::kDouble).unsqueeze(1);
}

/// The matrix with rows of zeros below, or columns of zeros on its right.
Tensor with_rows(const Tensor& matrix, int64_t count) { return at::constant_pad_nd(matrix, {0, 0, 0, count}); }
Tensor with_columns(const Tensor& matrix, int64_t count) { return at::constant_pad_nd(matrix, {0, count}); }

/// What tall matrices say of an update's factor a (r, n), the basis v (n, k) and the input filter p, q (n, f).
struct Reading {
  Reading(const Tensor& a, const Tensor& v, int64_t first, const Tensor& p, const Tensor& q)
      : a_p(small(a.mm(p))),
        v_p(small(v.narrow(1, 0, first).t().mm(p))),
        a_q(small(a.mm(q))),
        v_q(small(v.t().mm(q))),
        q_q(small(q.t().mm(q))) {}

  Tensor a_p;  ///< (r, f)
  Tensor v_p;  ///< (first, f)
  Tensor a_q;  ///< (r, f)
  Tensor v_q;  ///< (k, f)
  Tensor q_q;  ///< (f, f)
};

/// The side of a factor, from its coordinates (k, j) and its Gram matrix (j, j).
GramSide gram_side_of(const Tensor& coordinates, const Tensor& gram) {
  return {SmallMatrix(coordinates), SmallMatrix(gram - coordinates.t().mm(coordinates))};
}

}  // namespace

Filtered filtered(const CorrectionTask& task, const Directions& directions, const GramSides& update,
                  at::ScalarType dtype) {
  const auto& [left, right, reinforced] = directions;
  const auto first = static_cast<int64_t>(std::max({left.size(), right.size(), reinforced.size()}));
  const auto removed_left = 1 - column(left, first, 1), removed_right = 1 - column(right, first, 1);
  const auto added = column(reinforced, first, 0) * small(task.subspace.s.narrow(0, 0, first)).unsqueeze(1);
  const auto changed = removed_left.ne(0).logical_or(added.ne(0)).flatten().nonzero().flatten();

  const auto a = widened(task.factors.a, dtype), v = widened(task.subspace.v, dtype);
  const auto p = task.input_filter->p.to(dtype), q = task.input_filter->q.to(dtype);
  const Reading reading(a, v, first, p, q);
  const auto u_b = update.b.coordinates.tensor(), v_a = update.a.coordinates.tensor();
  const int64_t r = a.size(0), more = changed.size(0);

  // (X' - dW) p = [b, U_D] change
  const auto read = reading.a_p - (v_a.narrow(0, 0, first) * removed_right).t().mm(reading.v_p);
  const auto written = added * reading.v_p - removed_left * u_b.narrow(0, 0, first).mm(read);
  const auto change = at::cat({read - reading.a_p, written.index_select(0, changed)});

  Filtered x;
  const auto on_device = changed.to(task.subspace.u.device());
  x.b = at::cat({widened(task.factors.b, dtype).mul(task.factors.scale),
                 widened(task.subspace.u.index_select(1, on_device), dtype)},
                1);
  x.a = change.to(a.options()).mm(q.t());
  x.a.narrow(0, 0, r).add_(a);

  const auto axes = at::eye(u_b.size(0), at::kDouble).index_select(1, changed);
  const auto outside = with_rows(with_columns(update.b.outside.tensor(), more), more);
  x.sides.b = {SmallMatrix(at::cat({u_b, axes}, 1)), SmallMatrix(outside)};
  const auto coordinates = reading.v_q.mm(change.t()), gram = change.mm(reading.q_q).mm(change.t());
  x.distance = std::sqrt(total(norms2({x.sides.b, gram_side_of(coordinates, gram)})));
  const auto cross = with_rows(reading.a_q, more).mm(change.t());
  const auto of_a = with_rows(with_columns(update.a.outside.tensor() + v_a.t().mm(v_a), more), more);
  x.sides.a = gram_side_of(with_columns(v_a, more) + coordinates, of_a + cross + cross.t() + gram);
  const auto stretch = at::tensor(stretches(x.sides), x.b.options());
  x.b.mul_(stretch);
  x.a.div_(stretch.unsqueeze(1));
  return x;
}

}  // namespace csulora
