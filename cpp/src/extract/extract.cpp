#include "csulora/extract.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <algorithm>
#include <cmath>

#include "extract/certificate.h"
#include "extract/decomposition.h"
#include "extract/displacement.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"
#include "runtime/workspaces.h"

namespace csulora {
namespace {

using at::Tensor;

/// Columns beyond the targets make the start block miss a leading direction with negligible probability.
constexpr int64_t kOversampling = 16;
/// Columns of the start block on a CPU: half of the targets, but no fewer than this, nor more where only what stands
/// out is wanted. Of as many vectors, a Krylov space from few columns holds the leading directions more accurately
/// (Meyer, Musco & Musco 2024).
constexpr int64_t kFewColumns = 16;
/// Of equal singular values such a space holds no more than it has columns. Those whose share of difference is less may
/// be as many, and others with them.
constexpr double kEqual = 2e-3;
/// Below this many blocks per short side a full decomposition costs no more than the Krylov method.
constexpr int64_t kExactBlocks = 8;
/// Where more of the energy may be missing, a bound on what is missing that rests on residuals says little.
constexpr double kLargestEnergyTolerance = 0.1;
/// What is certified is looked for so much more accurately than it was made, that the certificate is not worse.
constexpr double kCertifiedShare = 0.5;

void check_options(const ExtractOptions& options) {
  check(options.rank >= 1, "rank is ", options.rank, "; it must be at least 1");
  check(!options.energy || (*options.energy > 0 && *options.energy <= 1), "energy must lie in (0, 1]");
  check(options.tolerance > 0 && options.tolerance < 1, "tolerance must lie in (0, 1)");
  check(options.energy_tolerance >= 0 && options.energy_tolerance <= kLargestEnergyTolerance,
        "energy_tolerance must lie in [0, ", kLargestEnergyTolerance, "]");
  const auto dtype = options.factor_dtype;
  check(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat,
        "factor_dtype must be float16, bfloat16 or float32");
}

/// Whether a search in a Krylov space takes less than a full decomposition.
bool is_searched(const Tensor& matrix, int64_t limit) {
  return std::min(matrix.size(0), matrix.size(1)) > kExactBlocks * (limit + kOversampling);
}

/// How many computed singular values are neither below a threshold nor rounding of the computation.
int64_t count_above(const Tensor& values, double threshold) {
  if (values.numel() == 0) {
    return 0;
  }
  const double floor = std::max(threshold, kResolution * values[0].item<double>());
  return values.gt(floor).sum().item<int64_t>();
}

/// The singular value, in standard deviations of the entries of white noise (m, n), above which keeping a direction
/// errs less than leaving it out: 4 / sqrt(3) sqrt(n) for a square matrix (Gavish & Donoho 2014, equation 11).
double optimal_threshold(double m, double n) {
  const double beta = std::min(m, n) / std::max(m, n);
  const double squared = 2 * (beta + 1) + 8 * beta / (beta + 1 + std::sqrt(beta * beta + 14 * beta + 1));
  return std::sqrt(squared * std::max(m, n));
}

/// The singular value above which a direction is told from rounding noise well enough to be kept: the same threshold,
/// 1.15 to 1.41 times the edge. The edge of noise that is given is a bound, with a margin of its own.
double kept_above(const Displacement& d, const ExtractOptions& options) {
  if (options.keep_noise) {
    return 0;
  }
  if (options.noise_std) {
    return d.noise_edge;
  }
  const auto m = static_cast<double>(d.matrix.size(0)), n = static_cast<double>(d.matrix.size(1));
  return d.noise_edge * optimal_threshold(m, n) / (std::sqrt(m) + std::sqrt(n));
}

/// How many leading singular values lie above the threshold for the noise that has all energy behind them.
int64_t count_above_bulk(const Tensor& values, const Displacement& d) {
  const auto m = static_cast<double>(d.matrix.size(0)), n = static_cast<double>(d.matrix.size(1));
  const auto behind = values.square().cumsum(0).neg_().add_(d.norm2).clamp_min_(0);
  const auto thresholds = behind.div_(m * n).sqrt_().mul_(optimal_threshold(m, n));
  return values.gt(thresholds).cumprod(0).sum().item<int64_t>();
}

/// How many leading directions the options ask for, at most `limit`, given all computed singular values.
int64_t count_targets(const Tensor& values, const Displacement& d, int64_t limit, const ExtractOptions& options) {
  int64_t count = std::min(limit, values.size(0));
  if (options.energy) {
    const auto captured_energy = values.square().cumsum(0);
    count = std::min(count, 1 + captured_energy.lt(*options.energy * d.norm2).sum().item<int64_t>());
  }
  if (options.above_bulk) {
    count = std::min(count, count_above_bulk(values, d));
  }
  return std::min(count, count_above(values, kept_above(d, options)));
}

/// Whether as many of the leading values are all but equal as the start block had columns: there may be more of them.
bool may_lack_equal_values(const SingularTriples& triples, int64_t block) {
  const auto& values = triples.computed;
  const int64_t windows = std::min(triples.s.size(0) + 1, values.size(0)) - block + 1;
  if (windows < 1) {
    return false;
  }
  const auto first = values.narrow(0, 0, windows), last = values.narrow(0, block - 1, windows);
  return (first - last).le(first * kEqual).any().item<bool>();
}

/// The triples from a Krylov space that starts with `block` columns; nothing if it did not suffice.
std::optional<SingularTriples> searched_triples(const Displacement& d, const TargetCount& target_count, int64_t limit,
                                                int64_t block, const ExtractOptions& options) {
  const int64_t max_blocks = std::min(d.matrix.size(0), d.matrix.size(1)) / 2 / block;
  const KrylovOptions krylov{block, max_blocks, {options.tolerance, options.energy_tolerance}, options.seed, limit};
  if (d.low_precision.defined()) {
    if (auto triples = low_precision_block_krylov(d.matrix, d.low_precision, target_count, krylov)) {
      return triples;
    }
  }
  return block_krylov(d.matrix, target_count, krylov);
}

SingularTriples leading_triples(const Displacement& d, int64_t limit, const ExtractOptions& options) {
  if (d.norm2 == 0) {
    const auto options = d.matrix.options();
    const auto none = at::empty({0}, options);
    return {at::empty({d.matrix.size(0), 0}, options),  none, at::empty({d.matrix.size(1), 0}, options),
            at::zeros({1}, options.dtype(at::kDouble)), 0,    none};
  }
  const auto target_count = [&](const Tensor& values) { return count_targets(values, d, limit, options); };
  if (is_searched(d.matrix, limit) && fits_float32(d)) {
    const OwnThreads own_threads;
    const int64_t widest = limit + kOversampling;
    const int64_t few = options.above_bulk ? kFewColumns : std::max(kFewColumns, limit / 2);
    const int64_t block = d.matrix.is_cpu() ? few : widest;
    auto triples = searched_triples(d, target_count, limit, block, options);
    if (triples && block < widest && may_lack_equal_values(*triples, block)) {
      triples = searched_triples(d, target_count, limit, widest, options);
    }
    if (triples) {
      return *std::move(triples);
    }
  }
  return exact_triples(d.matrix, target_count);
}

/// @param standing_out  the directions whose angle is certified; absent: as many as can be
Certificate measured(const Displacement& d, const Subspace& subspace, const SingularTriples& triples,
                     std::optional<int64_t> standing_out = {}) {
  const OwnThreads own_threads;
  auto certificate = measure_factors(d, subspace, {triples.upper, triples.largest_energy}, standing_out);
  certificate.above_noise = count_above(triples.computed, d.noise_edge);
  certificate.passes = triples.passes;
  return certificate;
}

/// The most directions that a matrix has, or that are asked for.
int64_t most_directions(const Tensor& matrix, const ExtractOptions& options) {
  return std::min({options.rank, matrix.size(0), matrix.size(1)});
}

/// D in the form that `decomposed` takes.
Displacement displacement_to_decompose(const Tensor& base, const Tensor& aligned, const ExtractOptions& options,
                                       Workspace* workspace) {
  check_options(options);
  check_matrix(base, "base");
  const bool with_low_precision = is_searched(base, most_directions(base, options));
  return displacement(base, aligned, options.noise_std, with_low_precision, workspace);
}

Subspace decomposed(const Displacement& d, const ExtractOptions& options) {
  const auto triples = leading_triples(d, most_directions(d.matrix, options), options);
  const OwnThreads own_threads;  // torch's would spin on beside the certificate's
  Subspace subspace{triples.u.to(options.factor_dtype).contiguous(), triples.s.to(at::kFloat),
                    triples.v.to(options.factor_dtype).contiguous()};
  check(subspace.s.isfinite().logical_and(subspace.s > 0).all().item<bool>(),
        "the singular values of aligned - base lie outside the range of float32");
  subspace.certificate = measured(d, subspace, triples);
  return subspace;
}

ExtractOptions options_of(const ExtractTask& task, ExtractOptions options) {
  options.noise_std = task.noise_std;
  return options;
}

/// What `work` returns; its messages begin with the task's label.
template <typename Work>
Subspace labelled(const ExtractTask& task, Work work) {
  try {
    return work();
  } catch (const InputError& error) {
    throw InputError(task.label + ": " + error.what());
  }
}

}  // namespace

Subspace extract_subspace(const Tensor& base, const Tensor& aligned, const ExtractOptions& options,
                          Workspace* workspace) {
  const TorchGuards torch_guards;
  const at::NoTF32Guard whole_floats;  // whatever a process allows its own products on a GPU
  return decomposed(displacement_to_decompose(base, aligned, options, workspace), options);
}

Subspace extract_subspace(ExtractTask&& task, const ExtractOptions& options, Workspace* workspace) {
  const TorchGuards torch_guards;
  const at::NoTF32Guard whole_floats;  // whatever a process allows its own products on a GPU
  return labelled(task, [&] {
    const auto own_options = options_of(task, options);
    const auto d = displacement_to_decompose(task.base, task.aligned, own_options, workspace);
    task.base.reset();
    task.aligned.reset();
    return decomposed(d, own_options);
  });
}

std::vector<Subspace> extract_subspaces(const std::vector<ExtractTask>& tasks, const ExtractOptions& options) {
  check_options(options);
  const bool on_device = std::any_of(
      tasks.begin(), tasks.end(), [](const ExtractTask& task) { return task.base.defined() && !task.base.is_cpu(); });
  Workspaces workspaces;
  std::vector<Subspace> results(tasks.size());
  for_each(tasks.size(), on_device, [&](size_t i) {
    const auto& task = tasks[i];
    const auto workspace = workspaces.lend();
    results[i] = labelled(
        task, [&] { return extract_subspace(task.base, task.aligned, options_of(task, options), workspace.get()); });
  });
  return results;
}

Certificate certify(const Tensor& base, const Tensor& aligned, const Subspace& subspace, const ExtractOptions& options,
                    std::optional<int64_t> standing_out) {
  check_options(options);
  validate(subspace);
  const int64_t directions = subspace.s.size(0);
  check(!standing_out || (*standing_out >= 0 && *standing_out <= directions), "standing_out is ",
        standing_out.value_or(0), "; the subspace has ", directions, " directions");
  check_same_device(subspace.u, base, "the subspace's u");
  const TorchGuards torch_guards;
  const at::NoTF32Guard whole_floats;  // whatever a process allows its own products on a GPU
  const auto d = displacement(base, aligned, options.noise_std);
  check(subspace.u.size(0) == d.matrix.size(0) && subspace.v.size(0) == d.matrix.size(1), "the subspace is for ",
        subspace.u.size(0), " x ", subspace.v.size(0), " and the matrices are ", d.matrix.sizes());
  ExtractOptions fresh = options;
  fresh.energy.reset();
  fresh.above_bulk = false;
  fresh.keep_noise = true;
  fresh.energy_tolerance *= kCertifiedShare;
  return measured(d, subspace, leading_triples(d, directions, fresh), standing_out);
}

}  // namespace csulora
