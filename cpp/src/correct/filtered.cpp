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

/// What is removed and added along the first directions, as many as the longest list of a task's names.
struct Rates {
  Rates(const Directions& directions, const Tensor& s)
      : first(static_cast<int64_t>(
            std::max({directions.left.size(), directions.right.size(), directions.reinforced.size()}))),
        removed_left(1 - column(directions.left, first, 1)),
        removed_right(1 - column(directions.right, first, 1)),
        added(column(directions.reinforced, first, 0) * small(s.narrow(0, 0, first)).unsqueeze(1)),
        changed(removed_left.ne(0).logical_or(added.ne(0)).flatten().nonzero().flatten()) {}

  int64_t first;
  Tensor removed_left;   ///< (first, 1) 1 - left
  Tensor removed_right;  ///< (first, 1) 1 - right
  Tensor added;          ///< (first, 1) reinforced s
  Tensor changed;        ///< (d) indices of D, the directions that X' changes on the left
};

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

/// C = [W' - a, added V_D^T - (1 - left) U_D^T b W'] p (r + d, f), so that X = [b, U_D] ([a, 0] + C q^T).
Tensor change_of(const Rates& rates, const Reading& reading, const Tensor& u_b, const Tensor& v_a) {
  // W' p = a p - a V (1 - right) V^T p
  const auto kept = reading.a_p - (v_a.narrow(0, 0, rates.first) * rates.removed_right).t().mm(reading.v_p);
  // added V^T p - (1 - left) U^T b W' p
  const auto along = rates.added * reading.v_p - rates.removed_left * u_b.narrow(0, 0, rates.first).mm(kept);
  return at::cat({kept - reading.a_p, along.index_select(0, rates.changed)});
}

/// [b, U_D]
Tensor with_changed_directions(const CorrectionTask& task, const Tensor& changed, at::ScalarType dtype) {
  const auto& u = task.subspace.u;
  return at::cat({widened(task.factors.b, dtype).mul(task.factors.scale),
                  widened(u.index_select(1, changed.to(u.device())), dtype)},
                 1);
}

/// [a, 0] + C q^T
Tensor with_change(const Tensor& a, const Tensor& change, const Tensor& q) {
  auto result = change.to(a.options()).mm(q.t());
  result.narrow(0, 0, a.size(0)).add_(a);
  return result;
}

/// The side of a factor, from its coordinates (k, j) and its Gram matrix (j, j).
GramSide gram_side_of(const Tensor& coordinates, const Tensor& gram) {
  return {SmallMatrix(coordinates), SmallMatrix(gram - coordinates.t().mm(coordinates))};
}

/// The side of [b, U_D]: directions are coordinate axes, and nothing of them lies outside.
GramSide side_with_axes(const GramSide& b, const Tensor& changed) {
  const auto u_b = b.coordinates.tensor();
  const int64_t more = changed.size(0);
  const auto axes = at::eye(u_b.size(0), at::kDouble).index_select(1, changed);
  return {SmallMatrix(at::cat({u_b, axes}, 1)), SmallMatrix(with_rows(with_columns(b.outside.tensor(), more), more))};
}

/// The sides of C q^T and of [a, 0] + C q^T, both transposed.
struct ChangedSides {
  ChangedSides(const GramSide& a, const Reading& reading, const Tensor& change) {
    const auto v_a = a.coordinates.tensor();
    const int64_t more = change.size(0) - v_a.size(1);
    // V^T q C^T, and C q^T q C^T
    const auto coordinates = reading.v_q.mm(change.t()), gram = change.mm(reading.q_q).mm(change.t());
    // [a, 0] q C^T
    const auto cross = with_rows(reading.a_q, more).mm(change.t());
    // [a, 0] [a, 0]^T
    const auto a_a = with_rows(with_columns(a.outside.tensor() + v_a.t().mm(v_a), more), more);
    of_change = gram_side_of(coordinates, gram);
    of_sum = gram_side_of(with_columns(v_a, more) + coordinates, a_a + cross + cross.t() + gram);
  }

  GramSide of_change;
  GramSide of_sum;
};

}  // namespace

Filtered filtered(const CorrectionTask& task, const Directions& directions, const GramSides& update,
                  at::ScalarType dtype) {
  const Rates rates(directions, task.subspace.s);
  const auto a = widened(task.factors.a, dtype), v = widened(task.subspace.v, dtype);
  const auto p = task.input_filter->p.to(dtype), q = task.input_filter->q.to(dtype);
  const Reading reading(a, v, rates.first, p, q);
  const auto change = change_of(rates, reading, update.b.coordinates.tensor(), update.a.coordinates.tensor());
  const ChangedSides sides(update.a, reading, change);

  Filtered x;
  x.b = with_changed_directions(task, rates.changed, dtype);
  x.a = with_change(a, change, q);
  x.sides.b = side_with_axes(update.b, rates.changed);
  x.sides.a = sides.of_sum;
  x.distance = std::sqrt(total(norms2({x.sides.b, sides.of_change})));  // |[b, U_D] C q^T|
  const auto stretch = at::tensor(stretches(x.sides), x.b.options());
  x.b.mul_(stretch);
  x.a.div_(stretch.unsqueeze(1));
  return x;
}

}  // namespace csulora
