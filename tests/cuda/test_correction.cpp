// The device code's correction, emulated, against dense float64 arithmetic.
#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "csulora/error.h"
#include "cuda/correction.h"
#include "cuda/correction_kernels.cuh"
#include "cuda/handles.h"
#include "gpu/correction_device.h"

namespace {

using at::Tensor;
using csulora::Attenuation;
using csulora::Correction;
using csulora::CorrectionOptions;
using csulora::CorrectionTask;
using csulora::Gains;
using csulora::InputError;
using csulora::LoraFactors;
using csulora::Penalties;
using csulora::RankRule;
using csulora::Subspace;

constexpr double kTolerance = 1e-5;  // float32 factors
constexpr double kCancelled = 1e-3;  // of a component that is a thousandth of the update
constexpr double kInfinity = std::numeric_limits<double>::infinity();
const CorrectionOptions kExact{RankRule::exact};
const CorrectionOptions kKeep{RankRule::keep};
const std::vector<Attenuation> kAttenuations{Penalties{0, 1, 1},       Penalties{0, kInfinity, kInfinity},
                                             Penalties{1, 1, 0},       Penalties{kInfinity, kInfinity, 0},
                                             Penalties{0, 0, 0},       Penalties{3, 0.5, 20},
                                             Gains{0.5, 1, 0.25, 0.5}, Gains{0, 1, 0, 0}};

Tensor gaussian(int64_t rows, int64_t columns) { return at::randn({rows, columns}); }

LoraFactors random_factors(int64_t rows, int64_t columns, int64_t rank, double scale = 2) {
  return {gaussian(rows, rank), gaussian(rank, columns), scale};
}

Subspace random_subspace(int64_t rows, int64_t columns, int64_t k, at::ScalarType dtype = at::kFloat) {
  const auto basis = [&](int64_t size) {
    return std::get<0>(at::linalg_qr(gaussian(size, k).to(at::kDouble))).to(dtype).contiguous();
  };
  return {basis(rows), at::arange(k, 0, -1).to(at::kFloat), basis(columns)};
}

Tensor update(const LoraFactors& factors) {
  return factors.b.to(at::kDouble).matmul(factors.a.to(at::kDouble)).mul(factors.scale);
}

/// Aligned, left, right, off.
std::vector<Tensor> components_of(const Tensor& dw, const Subspace& subspace) {
  const auto u = subspace.u.to(at::kDouble);
  const auto v = subspace.v.to(at::kDouble);
  const auto inside = u.matmul(u.t().matmul(dw));
  const auto outside = dw - inside;
  const auto aligned = inside.matmul(v).matmul(v.t());
  const auto right = outside.matmul(v).matmul(v.t());
  return {aligned, inside - aligned, right, outside - right};
}

/// |dW|^2 for exact projectors; a basis rounded to a storage type is not quite one.
double total_of(const std::vector<Tensor>& components) {
  double total = 0;
  for (const auto& component : components) {
    total += component.square().sum().item<double>();
  }
  return total;
}

std::vector<double> energies_of(const std::vector<Tensor>& components) {
  std::vector<double> norms2;
  const double total = total_of(components);
  for (const auto& component : components) {
    norms2.push_back(component.square().sum().item<double>());
  }
  for (double& norm2 : norms2) {
    norm2 = total == 0 ? 0 : norm2 / total;
  }
  return norms2;
}

std::vector<double> gains_of(const Attenuation& attenuation, const std::vector<double>& energies) {
  if (const auto* gains = std::get_if<Gains>(&attenuation)) {
    return {gains->aligned, gains->left, gains->right, gains->off};
  }
  const auto& [aligned, partial, off] = std::get<Penalties>(attenuation);
  const auto gain = [](double penalty, double energy) { return std::isinf(penalty) ? 0 : 1 / (1 + penalty * energy); };
  const double shared = gain(partial, energies[1] + energies[2]);
  return {gain(aligned, energies[0]), shared, shared, gain(off, energies[3])};
}

Tensor expected(const CorrectionTask& task) {
  const auto components = components_of(update(task.factors), task.subspace);
  const auto gains = gains_of(task.attenuation, energies_of(components));
  return components[0] * gains[0] + components[1] * gains[1] + components[2] * gains[2] + components[3] * gains[3];
}

Tensor best_approximation(const Tensor& x, int64_t rank) {
  const auto [left, values, right] = at::linalg_svd(x, false);
  const auto shared = std::min(rank, values.size(0));
  return left.narrow(1, 0, shared).mul(values.narrow(0, 0, shared)).matmul(right.narrow(0, 0, shared));
}

Correction corrected(const CorrectionTask& task, const CorrectionOptions& options = kExact) {
  return csulora::correct_on_device({task}, options).front();
}

double length(const Tensor& x) { return x.norm().item<double>(); }

/// What rounding a factor once may cost the product, relative to it: two units in the last place, for float32 several.
double tolerance(const Tensor& factor) {
  switch (factor.scalar_type()) {
    case at::kHalf:
      return 0x1p-10;
    case at::kBFloat16:
      return 0x1p-7;
    default:
      return kTolerance;
  }
}

/// -<X, U S V^T> / |S|^2; 0 for no directions.
double undo_of(const Tensor& x, const Subspace& subspace) {
  const auto s = subspace.s.to(at::kDouble);
  const auto alignment = subspace.u.to(at::kDouble).mul(s).matmul(subspace.v.to(at::kDouble).t());
  return s.numel() == 0 ? 0 : -(x * alignment).sum().item<double>() / s.square().sum().item<double>();
}

void check_agrees(const CorrectionTask& task, const CorrectionOptions& options, const Correction& result) {
  const auto dw = update(task.factors);
  const auto target = expected(task);
  const auto reference = options.rule == RankRule::keep ? best_approximation(target, task.factors.b.size(1)) : target;
  CHECK((result.factors.b.scalar_type() == task.factors.b.scalar_type()));
  CHECK((result.factors.a.scalar_type() == task.factors.a.scalar_type()));
  const double allowed = std::max(tolerance(task.factors.b), tolerance(task.factors.a));
  CHECK(length(update(result.factors) - reference) <= allowed * length(dw) + 1e-44 * length(task.factors.a));
  const auto components = components_of(dw, task.subspace);
  const auto energies = energies_of(components);
  const auto gains = gains_of(task.attenuation, energies);
  const auto& [aligned, left, right, off] = result.energies;
  CHECK(aligned == doctest::Approx(energies[0]).epsilon(1e-6));
  CHECK(left == doctest::Approx(energies[1]).epsilon(1e-6));
  CHECK(right == doctest::Approx(energies[2]).epsilon(1e-6));
  CHECK(off == doctest::Approx(energies[3]).epsilon(1e-6));
  CHECK(aligned + left + right + off == doctest::Approx(1).epsilon(1e-12));
  CHECK(result.gains.off == doctest::Approx(gains[3]).epsilon(1e-6));
  CHECK(result.norm == doctest::Approx(std::sqrt(total_of(components))).epsilon(1e-6));
  const auto& u = task.subspace.u;  // which undo_after takes for orthonormal
  const double rounding = u.scalar_type() == at::kFloat ? 1e-6 : tolerance(u);
  CHECK(std::abs(result.undo_after - undo_of(reference, task.subspace)) <= rounding * length(dw));
  CHECK(result.relative_change <= 1);
  CHECK(result.truncation_error >= 0);
  const double total = target.square().sum().item<double>();
  if (total > 1e-10 * dw.square().sum().item<double>()) {  // else what is left is rounding
    CHECK(result.truncation_error ==
          doctest::Approx((reference - target).square().sum().item<double>() / total).epsilon(1e-6));
  }
}

struct Problem {
  std::string name;
  LoraFactors factors;
  Subspace subspace;
};

std::vector<Problem> adversarial() {
  at::manual_seed(1);
  const auto subspace = random_subspace(60, 44, 9);
  const auto b = gaussian(60, 6);
  const auto a = gaussian(6, 44);
  const auto inside = [](const Tensor& basis) { return basis.matmul(gaussian(basis.size(1), 6)); };
  const auto grades = at::logspace(-6, 6, 6);
  const auto parallel = b.narrow(1, 0, 1) + 1e-4 * b;
  const auto duplicates = b.index_select(1, at::tensor({0, 0, 1, 1, 1, 2}));
  auto holes = b.clone();
  holes.select(1, 1).zero_();
  std::vector<Problem> problems{
      {"plain", {b, a, 0.5}, subspace},
      {"denormal b", {1e-41 * b, a, 0.5}, subspace},
      {"tiny factors", {1e-19 * b, 1e-19 * a, 0.5}, subspace},
      {"huge b", {1e37 * b, a, 0.5}, subspace},
      {"huge b, tiny a", {1e30 * b, 1e-30 * a, 0.5}, subspace},
      {"zero column", {holes, a, 0.5}, subspace},
      {"duplicated columns", {duplicates, a, 0.5}, subspace},
      {"near-parallel columns", {parallel, a, 0.5}, subspace},
      {"near-parallel columns that cancel", {parallel, a - a.mean(0), 0.5}, subspace},
      {"graded columns", {b * grades, a / grades.unsqueeze(1), 0.5}, subspace},
      {"b inside", {inside(subspace.u), a, 0.5}, subspace},
      {"a inside", {b, inside(subspace.v).t(), 0.5}, subspace},
      {"both inside", {inside(subspace.u), inside(subspace.v).t(), 0.5}, subspace},
      {"r > min(m, n)", random_factors(12, 9, 20), random_subspace(12, 9, 4)},
      {"k = min(m, n)", random_factors(30, 20, 5), random_subspace(30, 20, 20)},
      {"bfloat16 basis", random_factors(60, 44, 6), random_subspace(60, 44, 9, at::kBFloat16)},
      {"one by one", random_factors(1, 1, 1), random_subspace(1, 1, 1)},
      {"empty subspace", random_factors(20, 16, 3), random_subspace(20, 16, 0)},
      {"tall", random_factors(700, 8, 3), random_subspace(700, 8, 5)},
      {"r 40, k 3", random_factors(300, 200, 40), random_subspace(300, 200, 3)}};
  return problems;
}

}  // namespace

TEST_CASE("adversarial updates agree with dense arithmetic") {
  for (const auto& [name, factors, subspace] : adversarial()) {
    CAPTURE(name);
    for (size_t i = 0; i < kAttenuations.size(); ++i) {
      CAPTURE(i);
      const CorrectionTask task{factors, subspace, kAttenuations[i], "layer"};
      check_agrees(task, kExact, corrected(task, kExact));
      check_agrees(task, kKeep, corrected(task, kKeep));
    }
  }
}

TEST_CASE("an update almost inside the subspace keeps its outside share") {
  at::manual_seed(2);
  for (const auto dtype : {at::kFloat, at::kHalf}) {
    const auto subspace = random_subspace(300, 200, 24, dtype);
    for (const double outside : {1e-1, 1e-2, 1e-3, 1e-4, 1e-5}) {
      const auto inside = subspace.u.to(at::kFloat).matmul(gaussian(24, 8));
      const auto stray = gaussian(300, 8);
      const LoraFactors factors{inside + outside * stray * (length(inside) / length(stray)), gaussian(8, 200), 1};
      for (const auto& attenuation : kAttenuations) {
        const CorrectionTask task{factors, subspace, attenuation, "layer"};
        const auto target = expected(task);
        CAPTURE(outside);
        CHECK(length(update(corrected(task).factors) - target) <= kCancelled * length(target));
        const auto kept = update(corrected(task, kKeep).factors);
        CHECK(length(kept - best_approximation(target, 8)) <= kCancelled * length(target));
      }
    }
  }
}

TEST_CASE("columns that differ in float32's last digits keep their difference") {
  at::manual_seed(3);
  const auto column = gaussian(200, 1);
  const auto b = at::cat({column, column * (1 + 1e-6 * gaussian(200, 1))}, 1);
  const auto row = gaussian(1, 150);
  const LoraFactors factors{b, at::cat({row, -row}, 0), 1};
  const CorrectionTask task{factors, random_subspace(200, 150, 10), Penalties{}, "layer"};
  CHECK(length(update(corrected(task).factors) - expected(task)) <= kTolerance * length(update(factors)));
}

TEST_CASE("modules of several shapes, types and attenuations are corrected at once, in their order") {
  at::manual_seed(4);
  std::vector<CorrectionTask> tasks;
  const at::ScalarType types[] = {at::kFloat, at::kHalf, at::kBFloat16};
  for (int i = 0; i < 24; ++i) {
    const int64_t rows = i % 2 ? 120 : 72;
    const auto type = types[i % 3];
    auto factors = random_factors(rows, 90, 4 + i % 4, 0.5 + i);
    factors.b = factors.b.to(type);
    factors.a = factors.a.to(i == 7 ? at::kHalf : type);
    tasks.push_back({factors, random_subspace(rows, 90, 12, types[i / 8]), kAttenuations[i % kAttenuations.size()],
                     "layer " + std::to_string(i)});
  }
  for (const auto& options : {kExact, kKeep}) {
    const auto results = csulora::correct_on_device(tasks, options);
    for (size_t i = 0; i < tasks.size(); ++i) {
      CAPTURE(i);
      check_agrees(tasks[i], options, results[i]);
      CHECK(at::equal(corrected(tasks[i], options).factors.b, results[i].factors.b));
    }
  }
}

TEST_CASE("factors that are not contiguous are read as they are") {
  at::manual_seed(5);
  auto factors = random_factors(50, 40, 4);
  factors.b = factors.b.t().contiguous().t();
  auto subspace = random_subspace(50, 40, 6);
  subspace.u = subspace.u.t().contiguous().t();
  const CorrectionTask task{factors, subspace, Penalties{}, "layer"};
  check_agrees(task, kExact, corrected(task));
}

TEST_CASE("ranks follow the rule and the gains") {
  at::manual_seed(6);
  const auto factors = random_factors(50, 40, 4);
  const auto subspace = random_subspace(50, 40, 6);
  const auto rank = [&](const Attenuation& attenuation, const CorrectionOptions& options) {
    const auto result = corrected({factors, subspace, attenuation, "layer"}, options).factors;
    CHECK(result.b.is_contiguous());
    CHECK(result.a.is_contiguous());
    CHECK(result.b.size(1) == result.a.size(0));
    return result.a.size(0);
  };
  CHECK(rank(Penalties{0, 1, 1}, kExact) == 8);
  CHECK(rank(Penalties{0, 1, 1}, kKeep) == 4);
  CHECK(rank(Penalties{0, kInfinity, kInfinity}, kExact) == 4);
  CHECK(rank(Penalties{0, 0, 0}, kExact) == 4);
  CHECK(rank(Gains{0.5, 0.25, 1, 0.5}, kExact) == 4);
  CHECK(rank(Penalties{0, 1, 1}, {RankRule::fixed, 3}) == 3);
  CHECK(rank(Penalties{0, 1, 1}, {RankRule::fixed, 6}) == 6);
  CHECK(rank(Penalties{0, 1, 1}, {RankRule::fixed, 100}) == 8);
  CHECK(rank(Gains{0.5, 0.5, 0.5, 0.5}, {RankRule::fixed, 100}) == 4);
  const auto everything_off = random_subspace(50, 40, 0);  // the gains then factor, which only the energies tell
  const CorrectionTask task{factors, everything_off, Penalties{0, 1, 0}, "layer"};
  CHECK(corrected(task).factors.a.size(0) == 4);
  check_agrees(task, kExact, corrected(task));
}

TEST_CASE("gains of 1 give the update back to the bit") {
  at::manual_seed(7);
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    auto factors = random_factors(50, 40, 4, -0.75);
    factors.b = factors.b.to(dtype);
    factors.a = factors.a.to(dtype);
    for (const auto& options : {kExact, kKeep}) {
      const auto result = corrected({factors, random_subspace(50, 40, 6), Penalties{0, 0, 0}, "layer"}, options);
      CHECK(at::equal(result.factors.b, factors.b * factors.scale));
      CHECK(at::equal(result.factors.a, factors.a));
      CHECK(result.relative_change == 0);
      CHECK(result.truncation_error == 0);
    }
  }
}

TEST_CASE("with an input filter, columns that cancel are made anew before they are rounded") {
  at::manual_seed(10);
  const auto subspace = random_subspace(60, 40, 3);
  const auto inside = subspace.u.matmul(gaussian(3, 4)) + 0.01 * gaussian(60, 4);
  const csulora::Directions directions{{0, 0, 0}, {}, {}};
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    const LoraFactors factors{inside.to(dtype), gaussian(4, 40).to(dtype), 0.5};
    const CorrectionTask task{factors, subspace, directions, "layer", csulora::InputFilter{at::eye(40), at::eye(40)}};
    const auto result = csulora::correct(task, kExact);
    const auto u = subspace.u.to(at::kDouble), dw = update(factors);
    const auto kept = dw - u.matmul(u.t().matmul(dw));
    CHECK(length(kept) < 0.1 * length(dw));
    CHECK(length(update(result.factors) - kept) <= tolerance(result.factors.b) * length(kept));
  }
}

TEST_CASE("columns that differ by the last bit do not round back to what was taken away") {
  at::manual_seed(11);
  const auto subspace = random_subspace(60, 40, 3);
  const auto direction = subspace.u.narrow(1, 0, 1);
  const auto marks = direction.sign() * direction.abs().gt(0.1);
  const auto u = subspace.u.to(at::kDouble);
  const csulora::Directions directions{{0, 0, 0}, {}, {}};
  const auto no_filter = std::optional<csulora::InputFilter>(),
             all = std::optional(csulora::InputFilter{at::eye(40), at::eye(40)});
  for (const auto& [dtype, bits] : {std::pair(at::kFloat, 23), std::pair(at::kHalf, 10), std::pair(at::kBFloat16, 7)}) {
    const auto columns = at::cat({1 + std::ldexp(1.0, -bits) * marks, at::ones_like(marks)}, 1);
    const auto row = gaussian(1, 40).to(dtype);
    const LoraFactors factors{columns.to(dtype), at::cat({row, -row})};
    const auto dw = update(factors), kept = dw - u.matmul(u.t().matmul(dw));
    for (const auto& input_filter : {no_filter, all}) {
      const auto result = csulora::correct(CorrectionTask{factors, subspace, directions, "layer", input_filter}, kKeep);
      CHECK(length(update(result.factors) - kept) <= tolerance(factors.b) * length(kept));
    }
  }
}

TEST_CASE("an update of zero stays zero") {
  const LoraFactors factors{at::zeros({20, 3}), at::ones({3, 16}), 1};
  for (const CorrectionOptions& options : {kExact, kKeep, CorrectionOptions{RankRule::fixed, 1}}) {
    const auto result = corrected({factors, random_subspace(20, 16, 4), Penalties{3, 0.5, 20}, "layer"}, options);
    CHECK(length(update(result.factors)) == 0);
    CHECK(result.norm == 0);
    CHECK(result.relative_change == 0);
    CHECK(result.undo == 0);
    CHECK(result.truncation_error == 0);
    CHECK(result.energies.off == 0);
  }
}

TEST_CASE("undo is the share of the alignment that is removed") {
  const auto subspace = random_subspace(60, 50, 8);
  for (const double share : {1.0, 0.3, -0.5}) {
    const LoraFactors factors{subspace.u * subspace.s, subspace.v.t(), -share};
    const auto result = corrected({factors, subspace, Penalties{}, "layer"});
    CHECK(result.undo == doctest::Approx(share).epsilon(1e-6));
    CHECK(result.energies.aligned == doctest::Approx(1).epsilon(1e-6));
  }
}

TEST_CASE("same input, same bits") {
  at::manual_seed(8);
  const CorrectionTask task{random_factors(200, 150, 8), random_subspace(200, 150, 12), Penalties{}, "layer"};
  const auto first = corrected(task, kKeep);
  const auto second = corrected(task, kKeep);
  CHECK(at::equal(first.factors.b, second.factors.b));
  CHECK(at::equal(first.factors.a, second.factors.a));
  CHECK(first.undo == second.undo);
}

TEST_CASE("values that cannot be used are named by their module") {
  at::manual_seed(9);
  const CorrectionTask good{random_factors(20, 16, 3), random_subspace(20, 16, 4), Penalties{}, "good"};
  auto bad = good;
  bad.label = "bad";
  const auto message = [&](const CorrectionTask& task) -> std::string {
    try {
      csulora::correct_on_device({good, task, good}, kKeep);
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  };
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (int where = 0; where < 5; ++where) {
      CAPTURE(where);
      auto task = bad;
      Tensor* const tensors[] = {&task.factors.b, &task.factors.a, &task.subspace.u, &task.subspace.s,
                                 &task.subspace.v};
      *tensors[where] = tensors[where]->clone();
      tensors[where]->view(-1)[0] = value;
      CHECK(message(task).starts_with("bad: the update or the subspace holds NaN"));
    }
  }
  bad.factors = {1e37 * good.factors.b, 1e37 * good.factors.a, 1e6};
  CHECK(message(bad).starts_with("bad: the corrected update is too large for Float"));
  bad.factors = {(1e4 * good.factors.b).to(at::kHalf), good.factors.a.to(at::kBFloat16), 1e12};
  CHECK(message(bad).starts_with("bad: the corrected update is too large for Half"));
  bad.factors = {good.factors.b.to(at::kBFloat16), (1e4 * good.factors.a).to(at::kHalf), 1e12};
  CHECK(message(bad).starts_with("bad: the corrected update is too large for Half"));
  CHECK(message(good) == "");
}

TEST_CASE("eigenvectors that are none are a failure, whatever their solver says") {
  using csulora::cuda::Measured;
  const auto projected = at::eye(2, at::kDouble) / std::sqrt(2);
  const auto core = at::eye(2, at::kDouble);
  auto values = at::empty({2}, at::kDouble), left = at::empty({2, 1}, at::kDouble), right = at::empty_like(left);
  const auto failures = [&](const Tensor& of_core, double core_norm) {
    Measured measured{};
    measured.core_norm = core_norm;
    csulora::cuda::balance({2, 1, core.data_ptr<double>(), of_core.data_ptr<double>(), values.data_ptr<double>(),
                            left.data_ptr<double>(), right.data_ptr<double>()},
                           1, &measured, nullptr);
    const int status = 1;
    csulora::cuda::count_failures(&status, 1, 1, &measured, nullptr);
    return measured.failures;
  };
  CHECK(failures(projected, 3) == 1);
  CHECK(failures(1.00001 * projected, 3) == 2);
  CHECK(failures(std::numeric_limits<double>::quiet_NaN() * projected, 3) == 2);
  CHECK(failures(0 * projected, 0) == 1);
}

TEST_CASE("nothing is written outside the workspace") {
  using enum csulora::cuda::Element;
  const csulora::cuda::CorrectionShape shape{2, 30, 20, 3, 4, 3, single, single, single};
  const csulora::cuda::HandleLease lease(nullptr);
  csulora::cuda::CorrectionPlan plan(shape, lease);
  const auto bytes = static_cast<int64_t>(plan.workspace_bytes());
  constexpr int64_t kGuard = 4096;
  constexpr int kMark = 0xAB;
  auto memory = at::full({bytes + 2 * kGuard}, kMark, at::kByte);
  const auto b = gaussian(30, 3), a = gaussian(3, 20);
  const auto subspace = random_subspace(30, 20, 4);
  auto result_b = at::empty({2, 30, 3}), result_a = at::empty({2, 3, 20});
  std::vector<csulora::cuda::ModuleArguments> modules;
  for (int64_t i = 0; i < 2; ++i) {
    modules.push_back({b.data_ptr(),
                       a.data_ptr(),
                       subspace.u.data_ptr(),
                       subspace.s.data_ptr<float>(),
                       subspace.v.data_ptr(),
                       result_b[i].data_ptr(),
                       result_a[i].data_ptr(),
                       1,
                       {.kind = csulora::cuda::Attenuation::Kind::penalties, .penalties = {0, 1, 1}}});
  }
  std::vector<csulora::cuda::Measured> measured(2);
  plan.run(modules.data(), measured.data(), memory.data_ptr<uint8_t>() + kGuard);
  CHECK(memory.narrow(0, 0, kGuard).eq(kMark).all().item<bool>());
  CHECK(memory.narrow(0, kGuard + bytes, kGuard).eq(kMark).all().item<bool>());
  CHECK(measured[1].finite == 1);
  CHECK(measured[1].failures == 0);
  CHECK(at::equal(result_b[0], result_b[1]));
}
