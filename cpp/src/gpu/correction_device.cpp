#include "gpu/correction_device.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <tuple>

#include "correct/result_rank.h"
#include "cuda/correction.h"
#include "cuda/handles.h"
#include "gpu/element.h"
#include "gpu/stream.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"

namespace csulora {
namespace {

using at::Tensor;
using cuda::CorrectionShape;
using cuda::Measured;
using cuda::ModuleArguments;

/// What modules corrected at once may take besides what the libraries ask for. More would hardly be faster, and a
/// server leaves little memory.
constexpr size_t kWorkspace = size_t{1} << 30;
/// The largest batch that a kernel's grid takes.
constexpr size_t kLargestBatch = 65535;

/// Whether X has the update's rank whatever the energies are.
bool always_factors(const Attenuation& attenuation) {
  if (const auto* gains = std::get_if<Gains>(&attenuation)) {
    return gains_factor(*gains);
  }
  const auto& [aligned, partial, off] = std::get<Penalties>(attenuation);
  return (aligned == 0 && partial == 0 && off == 0) ||
         (std::isinf(partial) && (std::isinf(aligned) || std::isinf(off)));
}

cuda::Attenuation packed(const Attenuation& attenuation) {
  using Kind = cuda::Attenuation::Kind;
  if (const auto* gains = std::get_if<Gains>(&attenuation)) {
    return {.kind = Kind::gains, .gains = {gains->aligned, gains->left, gains->right, gains->off}};
  }
  const auto& [aligned, partial, off] = std::get<Penalties>(attenuation);
  return {.kind = Kind::penalties, .penalties = {aligned, partial, off}};
}

/// A task with its tensors as the device code reads them, and where its result goes.
struct Module {
  const CorrectionTask* task;
  Tensor b, a, u, s, v;  // row-major
  CorrectionShape shape;
  Tensor result_b, result_a;
};

Module prepared(const CorrectionTask& task, const CorrectionOptions& options) {
  const auto& [b, a, scale] = task.factors;
  const auto& [u, s, v, certificate] = task.subspace;
  Module module{&task, b.contiguous(), a.contiguous(), u.contiguous(), s.contiguous(), v.contiguous(), {}, {}, {}};
  const int64_t rank = module.b.size(1);
  const int64_t shorter = std::min(module.b.size(0), module.a.size(1));
  const int64_t exact = always_factors(task.attenuation) ? rank : std::min(2 * rank, shorter);
  module.shape = {0,
                  module.b.size(0),
                  module.a.size(1),
                  rank,
                  s.size(0),
                  result_rank(options, exact, rank),
                  element_of(b),
                  element_of(a),
                  element_of(u)};
  const auto& shape = module.shape;
  check(shape.rows > 0 && shape.columns > 0, task.label, ": the update is empty");
  check(std::max(shape.rows, shape.columns) <= std::numeric_limits<int32_t>::max(), task.label, ": is too large");
  module.result_b = at::empty({shape.rows, shape.result_rank}, b.options());
  module.result_a = at::empty({shape.result_rank, shape.columns}, a.options());
  return module;
}

/// Modules of one shape that are corrected at once: positions in the list of all.
struct Batch {
  CorrectionShape shape;
  std::vector<size_t> modules;
};

std::vector<Batch> batches(const std::vector<Module>& modules) {
  const auto key = [](const CorrectionShape& s) {
    return std::tuple(s.rows, s.columns, s.rank, s.directions, s.result_rank, s.b, s.a, s.basis);
  };
  std::map<decltype(key(CorrectionShape{})), std::vector<size_t>> groups;
  for (size_t i = 0; i < modules.size(); ++i) {
    groups[key(modules[i].shape)].push_back(i);
  }
  std::vector<Batch> result;
  for (const auto& [shape_key, members] : groups) {
    auto shape = modules[members.front()].shape;
    const size_t fit = std::clamp<size_t>(kWorkspace / cuda::CorrectionPlan::bytes_per_module(shape), 1, kLargestBatch);
    for (size_t first = 0; first < members.size(); first += fit) {
      const size_t last = std::min(first + fit, members.size());
      shape.count = static_cast<int64_t>(last - first);
      result.push_back({shape, {members.begin() + first, members.begin() + last}});
    }
  }
  return result;
}

/// The bytes of one T per module.
template <typename T>
Tensor table_of(int64_t modules, const at::TensorOptions& where) {
  return at::empty({modules, sizeof(T)}, where.dtype(at::kByte));
}

template <typename T>
T* rows_of(const Tensor& table) {
  return reinterpret_cast<T*>(table.mutable_data_ptr());
}

/// What the device code reads and writes, by module in the order of the batches.
struct Tables {
  Tensor arguments;  // ModuleArguments
  Tensor measured;   // Measured
};

ModuleArguments arguments_of(const Module& module) {
  return {.b = module.b.data_ptr(),
          .a = module.a.data_ptr(),
          .u = module.u.data_ptr(),
          .s = module.s.data_ptr<float>(),
          .v = module.v.data_ptr(),
          .result_b = module.result_b.data_ptr(),
          .result_a = module.result_a.data_ptr(),
          .scale = module.task->factors.scale,
          .attenuation = packed(module.task->attenuation)};
}

Tables tables(const std::vector<Module>& modules, const std::vector<Batch>& batches) {
  const auto count = static_cast<int64_t>(modules.size());
  const auto device = modules.front().b.device();
  const auto host = at::TensorOptions().pinned_memory(device.is_cuda());  // or copying would wait for the stream
  const auto arguments = table_of<ModuleArguments>(count, host);
  auto* row = rows_of<ModuleArguments>(arguments);
  for (const auto& batch : batches) {
    for (const size_t i : batch.modules) {
      *row++ = arguments_of(modules[i]);
    }
  }
  return {arguments.to(device, /*non_blocking=*/true), table_of<Measured>(count, device)};
}

Components components(const double numbers[4]) { return {numbers[0], numbers[1], numbers[2], numbers[3]}; }

Correction result(const Module& module, const Measured& measured, const CorrectionOptions& options) {
  const auto& label = module.task->label;
  check(std::isfinite(measured.norm) && std::isfinite(measured.undo), label,
        ": the update or the subspace holds NaN, infinity or values too large");
  for (const Tensor& factor : {module.result_b, module.result_a}) {
    check_fits(measured.finite != 0 || factor.isfinite().all().item<bool>(), factor.scalar_type(), label);
  }
  check_internal(measured.failures == 0, label, ": a small decomposition did not succeed on the GPU");
  Correction correction;
  correction.energies = components(measured.energies);
  correction.gains = components(measured.gains);
  correction.norm = measured.norm;
  correction.relative_change = measured.relative_change;
  correction.undo = measured.undo;
  correction.truncation_error = measured.truncation_error;
  // Singular values descend, so that a rank which only the energies reveal is cut out of the larger one.
  const auto& shape = module.shape;
  const int64_t exact = exact_rank(correction.gains, shape.rank, std::min(shape.rows, shape.columns));
  const int64_t rank = result_rank(options, exact, shape.rank);
  correction.undo_after = rank < exact ? measured.undo_after : correction.gains.aligned * correction.undo;
  correction.factors = {module.result_b.narrow(1, 0, rank).contiguous(),
                        module.result_a.narrow(0, 0, rank).contiguous()};
  return correction;
}

}  // namespace

std::vector<Correction> correct_on_device(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options) {
  const auto& first_b = tasks.front().factors.b;
  for (const auto& task : tasks) {
    check_same_device(task.factors.b, first_b, task.label + ": b");
  }
  const TorchGuards torch_guards;
  const auto device = first_b.device();
  const c10::DeviceGuard guard(device);
  const cuda::HandleLease lease(static_cast<cudaStream_t>(current_stream(device)));

  std::vector<Module> modules;
  for (const auto& task : tasks) {
    modules.push_back(prepared(task, options));
  }
  const auto split = batches(modules);
  const auto device_tables = tables(modules, split);
  std::vector<std::unique_ptr<cuda::CorrectionPlan>> plans;  // until what they enqueued has been done
  int64_t first = 0;
  for (const auto& batch : split) {
    auto& plan = *plans.emplace_back(std::make_unique<cuda::CorrectionPlan>(batch.shape, lease));
    const auto bytes = static_cast<int64_t>(plan.workspace_bytes());
    const auto workspace = at::empty({bytes}, device_tables.measured.options());
    plan.run(rows_of<ModuleArguments>(device_tables.arguments) + first,
             rows_of<Measured>(device_tables.measured) + first, workspace.mutable_data_ptr());
    first += batch.shape.count;
  }

  const auto measured = device_tables.measured.to(at::kCPU);  // the one wait
  const auto* rows = rows_of<Measured>(measured);
  std::vector<const Measured*> found(tasks.size());
  for (const auto& batch : split) {
    for (const size_t i : batch.modules) {
      found[i] = rows++;
    }
  }
  std::vector<Correction> results;
  for (size_t i = 0; i < tasks.size(); ++i) {
    results.push_back(result(modules[i], *found[i], options));
  }
  return results;
}

}  // namespace csulora
