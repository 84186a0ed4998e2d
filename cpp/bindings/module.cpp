// A core per minor version of torch, csulora._core_2_13 and so on: converts and registers.
// python/csulora/_core.pyi says what Python sees.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "csulora/annihilation.h"
#include "csulora/correct.h"
#include "csulora/error.h"
#include "csulora/extract.h"
#include "csulora/subspace.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

void raise(const char* type, const char* message) {
  py::set_error(py::module_::import("csulora.errors").attr(type), message);
}

void translate(std::exception_ptr pending) {
  try {
    if (pending) {
      std::rethrow_exception(pending);
    }
  } catch (const csulora::InputError& error) {
    raise("InputError", error.what());
  } catch (const csulora::DeviceMemoryError& error) {
    raise("DeviceMemoryError", error.what());
  } catch (const csulora::DeviceError& error) {
    raise("DeviceError", error.what());
  } catch (const csulora::InternalError& error) {
    raise("InternalError", error.what());
  } catch (const c10::OutOfMemoryError& error) {  // torch's, for memory of a GPU
    raise("DeviceMemoryError", error.what_without_backtrace());
  } catch (const c10::Error& error) {  // LibTorch itself gave up: memory, a decomposition that does not converge
    raise("InternalError", error.what_without_backtrace());
  }
}

void register_subspace(py::module_& module) {
  using csulora::Certificate;
  using csulora::ExtractOptions;
  using csulora::ExtractTask;
  using csulora::Subspace;
  using csulora::Workspace;

  py::class_<Certificate>(module, "Certificate")
      .def(py::init<>())
      .def_readwrite("displacement_norm2", &Certificate::displacement_norm2)
      .def_readwrite("captured_energy", &Certificate::captured_energy)
      .def_readwrite("optimal_share", &Certificate::optimal_share)
      .def_readwrite("residual", &Certificate::residual)
      .def_readwrite("orthonormality", &Certificate::orthonormality)
      .def_readwrite("next_value", &Certificate::next_value)
      .def_readwrite("standing_out", &Certificate::standing_out)
      .def_readwrite("subspace_error", &Certificate::subspace_error)
      .def_readwrite("noise_edge", &Certificate::noise_edge)
      .def_readwrite("above_noise", &Certificate::above_noise)
      .def_readwrite("passes", &Certificate::passes);

  py::class_<Subspace>(module, "Subspace")
      .def(py::init<at::Tensor, at::Tensor, at::Tensor>(), "u"_a, "s"_a, "v"_a)
      .def_readonly("u", &Subspace::u)
      .def_readonly("s", &Subspace::s)
      .def_readonly("v", &Subspace::v)
      .def_readonly("certificate", &Subspace::certificate);

  py::class_<ExtractOptions>(module, "ExtractOptions")
      .def(py::init<>())
      .def_readwrite("rank", &ExtractOptions::rank)
      .def_readwrite("energy", &ExtractOptions::energy)
      .def_readwrite("above_bulk", &ExtractOptions::above_bulk)
      .def_readwrite("tolerance", &ExtractOptions::tolerance)
      .def_readwrite("energy_tolerance", &ExtractOptions::energy_tolerance)
      .def_readwrite("keep_noise", &ExtractOptions::keep_noise)
      .def_readwrite("noise_std", &ExtractOptions::noise_std)
      .def_readwrite("factor_dtype", &ExtractOptions::factor_dtype)
      .def_readwrite("seed", &ExtractOptions::seed);

  py::class_<Workspace>(module, "Workspace").def(py::init<>());

  py::class_<ExtractTask>(module, "ExtractTask")
      .def(py::init<at::Tensor, at::Tensor, std::string, std::optional<double>>(), "base"_a, "aligned"_a,
           "label"_a = "displacement", "noise_std"_a = py::none())
      .def_readonly("base", &ExtractTask::base)
      .def_readonly("aligned", &ExtractTask::aligned)
      .def_readonly("label", &ExtractTask::label)
      .def_readonly("noise_std", &ExtractTask::noise_std);

  module.def("extract_subspace",
             py::overload_cast<const at::Tensor&, const at::Tensor&, const ExtractOptions&, Workspace*>(
                 &csulora::extract_subspace),
             "base"_a, "aligned"_a, "options"_a = ExtractOptions{}, "workspace"_a = nullptr,
             py::call_guard<py::gil_scoped_release>());
  module.def(
      "extract_subspace",
      [](ExtractTask& task, const ExtractOptions& options, Workspace* workspace) {
        return csulora::extract_subspace(std::move(task), options, workspace);
      },
      "task"_a, "options"_a = ExtractOptions{}, "workspace"_a = nullptr, py::call_guard<py::gil_scoped_release>());
  module.def("extract_subspaces", &csulora::extract_subspaces, "tasks"_a, "options"_a = ExtractOptions{},
             py::call_guard<py::gil_scoped_release>());
  module.def("validate", py::overload_cast<const Subspace&>(&csulora::validate), "subspace"_a,
             py::call_guard<py::gil_scoped_release>());
  module.def("validate", py::overload_cast<const std::vector<std::pair<std::string, Subspace>>&>(&csulora::validate),
             "subspaces"_a, py::call_guard<py::gil_scoped_release>());
  module.def("certify", &csulora::certify, "base"_a, "aligned"_a, "subspace"_a, "options"_a = ExtractOptions{},
             "standing_out"_a = py::none(), py::call_guard<py::gil_scoped_release>());
}

void register_correction(py::module_& module) {
  using csulora::Attenuation;
  using csulora::Components;
  using csulora::Correction;
  using csulora::CorrectionOptions;
  using csulora::CorrectionTask;
  using csulora::Directions;
  using csulora::InputFilter;
  using csulora::LoraFactors;
  using csulora::Penalties;
  using csulora::RankRule;

  py::class_<LoraFactors>(module, "LoraFactors")
      .def(py::init<at::Tensor, at::Tensor, double>(), "b"_a, "a"_a, "scale"_a = 1.0)
      .def_readonly("b", &LoraFactors::b)
      .def_readonly("a", &LoraFactors::a)
      .def_readonly("scale", &LoraFactors::scale);

  py::class_<Components>(module, "Components")
      .def(py::init<double, double, double, double>(), "aligned"_a, "left"_a, "right"_a, "off"_a)
      .def_readonly("aligned", &Components::aligned)
      .def_readonly("left", &Components::left)
      .def_readonly("right", &Components::right)
      .def_readonly("off", &Components::off);

  py::class_<Penalties>(module, "Penalties")
      .def(py::init<double, double, double>(), "aligned"_a, "partial"_a, "off"_a)
      .def_readonly("aligned", &Penalties::aligned)
      .def_readonly("partial", &Penalties::partial)
      .def_readonly("off", &Penalties::off);

  using Numbers = std::vector<double>;
  py::class_<Directions>(module, "Directions")
      .def(py::init<Numbers, Numbers, Numbers>(), "left"_a, "right"_a, "reinforced"_a = Numbers{})
      .def_readonly("left", &Directions::left)
      .def_readonly("right", &Directions::right)
      .def_readonly("reinforced", &Directions::reinforced);

  py::enum_<RankRule>(module, "RankRule")
      .value("keep", RankRule::keep)
      .value("exact", RankRule::exact)
      .value("fixed", RankRule::fixed);

  py::class_<CorrectionOptions>(module, "CorrectionOptions")
      .def(py::init<RankRule, int64_t, std::optional<double>>(), "rule"_a = RankRule::keep, "rank"_a = 0,
           "reference_energy"_a = py::none())
      .def_readonly("rule", &CorrectionOptions::rule)
      .def_readonly("rank", &CorrectionOptions::rank)
      .def_readonly("reference_energy", &CorrectionOptions::reference_energy);

  py::class_<InputFilter>(module, "InputFilter")
      .def(py::init<at::Tensor, at::Tensor>(), "p"_a, "q"_a)
      .def_readonly("p", &InputFilter::p)
      .def_readonly("q", &InputFilter::q);

  py::class_<CorrectionTask>(module, "CorrectionTask")
      .def(py::init<LoraFactors, csulora::Subspace, Attenuation, std::string, std::optional<InputFilter>>(),
           "factors"_a, "subspace"_a, "attenuation"_a, "label"_a = "update", "input_filter"_a = py::none())
      .def_readonly("factors", &CorrectionTask::factors)
      .def_readonly("subspace", &CorrectionTask::subspace)
      .def_readonly("attenuation", &CorrectionTask::attenuation)
      .def_readonly("label", &CorrectionTask::label)
      .def_readonly("input_filter", &CorrectionTask::input_filter);

  py::class_<Correction>(module, "Correction")
      .def(py::init<LoraFactors, Components, Components, double, double, double, double, double>(), "factors"_a,
           "energies"_a, "gains"_a, "norm"_a, "relative_change"_a, "undo"_a, "undo_after"_a, "truncation_error"_a)
      .def_readonly("factors", &Correction::factors)
      .def_readonly("energies", &Correction::energies)
      .def_readonly("gains", &Correction::gains)
      .def_readonly("norm", &Correction::norm)
      .def_readonly("relative_change", &Correction::relative_change)
      .def_readonly("undo", &Correction::undo)
      .def_readonly("undo_after", &Correction::undo_after)
      .def_readonly("truncation_error", &Correction::truncation_error);

  module.def("energy_along", &csulora::energy_along, "tasks"_a, "directions"_a,
             py::call_guard<py::gil_scoped_release>());
  module.def("penalty_scale", &csulora::penalty_scale, "energy"_a, "reference_energy"_a);
  module.def("norm", &csulora::norm, "factors"_a, py::call_guard<py::gil_scoped_release>());
  module.def("correct",
             py::overload_cast<const std::vector<CorrectionTask>&, const CorrectionOptions&>(&csulora::correct),
             "tasks"_a, "options"_a = CorrectionOptions{}, py::call_guard<py::gil_scoped_release>());
}

void register_annihilation(py::module_& module) {
  using csulora::Annihilation;
  using csulora::AnnihilationTask;

  py::class_<AnnihilationTask>(module, "AnnihilationTask")
      .def(py::init<csulora::LoraFactors, at::Tensor, std::string>(), "factors"_a, "weight"_a, "label"_a = "update");

  py::class_<Annihilation>(module, "Annihilation")
      .def_readonly("ratio", &Annihilation::ratio)
      .def_readonly("rank", &Annihilation::rank);

  module.def("annihilations", &csulora::annihilations, "tasks"_a, py::call_guard<py::gil_scoped_release>());
  module.def("sketches", &csulora::sketches, "matrices"_a, "columns"_a, "seed"_a, "dtype"_a = at::kFloat,
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(CSULORA_CORE, module) {
  module.attr("TORCH_VERSION") = CSULORA_TORCH_VERSION;
  module.attr("CUDA") = bool{CSULORA_CUDA};
  py::register_local_exception_translator(&translate);
  register_subspace(module);
  register_correction(module);
  register_annihilation(module);
}
