// csulora._core: converts and registers; python/csulora/_core.pyi says what Python sees.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

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
  using csulora::Subspace;
  using csulora::Workspace;

  py::class_<Certificate>(module, "Certificate")
      .def(py::init<>())
      .def_readwrite("displacement_norm2", &Certificate::displacement_norm2)
      .def_readwrite("captured", &Certificate::captured)
      .def_readwrite("residual", &Certificate::residual)
      .def_readwrite("orthonormality", &Certificate::orthonormality)
      .def_readwrite("next_value", &Certificate::next_value)
      .def_readwrite("missed", &Certificate::missed)
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
      .def_readwrite("tolerance", &ExtractOptions::tolerance)
      .def_readwrite("keep_noise", &ExtractOptions::keep_noise)
      .def_readwrite("noise_std", &ExtractOptions::noise_std)
      .def_readwrite("factor_dtype", &ExtractOptions::factor_dtype)
      .def_readwrite("seed", &ExtractOptions::seed);

  py::class_<Workspace>(module, "Workspace").def(py::init<>());

  module.def("extract_subspace", &csulora::extract_subspace, "base"_a, "aligned"_a, "options"_a = ExtractOptions{},
             "workspace"_a = nullptr, py::call_guard<py::gil_scoped_release>());
  module.def("validate", py::overload_cast<const Subspace&>(&csulora::validate), "subspace"_a,
             py::call_guard<py::gil_scoped_release>());
  module.def("validate", py::overload_cast<const std::vector<std::pair<std::string, Subspace>>&>(&csulora::validate),
             "subspaces"_a, py::call_guard<py::gil_scoped_release>());
  module.def("certify", &csulora::certify, "base"_a, "aligned"_a, "subspace"_a, "options"_a = ExtractOptions{},
             py::call_guard<py::gil_scoped_release>());
}

void register_correction(py::module_& module) {
  using csulora::Attenuation;
  using csulora::Correction;
  using csulora::CorrectionOptions;
  using csulora::CorrectionTask;
  using csulora::Directions;
  using csulora::LoraPair;
  using csulora::Parts;
  using csulora::Penalties;
  using csulora::RankRule;
  using csulora::Scope;

  py::class_<LoraPair>(module, "LoraPair")
      .def(py::init<at::Tensor, at::Tensor, double>(), "b"_a, "a"_a, "scale"_a = 1.0)
      .def_readonly("b", &LoraPair::b)
      .def_readonly("a", &LoraPair::a)
      .def_readonly("scale", &LoraPair::scale);

  py::class_<Parts>(module, "Parts")
      .def(py::init<double, double, double, double>(), "aligned"_a, "left"_a, "right"_a, "off"_a)
      .def_readonly("aligned", &Parts::aligned)
      .def_readonly("left", &Parts::left)
      .def_readonly("right", &Parts::right)
      .def_readonly("off", &Parts::off);

  py::class_<Penalties>(module, "Penalties")
      .def(py::init<double, double, double>(), "aligned"_a, "partial"_a, "off"_a)
      .def_readonly("aligned", &Penalties::aligned)
      .def_readonly("partial", &Penalties::partial)
      .def_readonly("off", &Penalties::off);

  using Numbers = std::vector<double>;
  py::class_<Directions>(module, "Directions")
      .def(py::init<Numbers, Numbers, Numbers>(), "left"_a, "right"_a, "restored"_a = Numbers{})
      .def_readonly("left", &Directions::left)
      .def_readonly("right", &Directions::right)
      .def_readonly("restored", &Directions::restored);

  py::enum_<RankRule>(module, "RankRule")
      .value("keep", RankRule::keep)
      .value("exact", RankRule::exact)
      .value("fixed", RankRule::fixed);

  py::class_<CorrectionOptions>(module, "CorrectionOptions")
      .def(py::init<RankRule, int64_t, std::optional<double>>(), "rule"_a = RankRule::keep, "rank"_a = 0,
           "usual_energy"_a = py::none())
      .def_readonly("rule", &CorrectionOptions::rule)
      .def_readonly("rank", &CorrectionOptions::rank)
      .def_readonly("usual_energy", &CorrectionOptions::usual_energy);

  module.attr("LEAST_STRENGTH") = csulora::kLeastStrength;

  py::class_<Scope>(module, "Scope")
      .def(py::init<at::Tensor, at::Tensor>(), "p"_a, "q"_a)
      .def_readonly("p", &Scope::p)
      .def_readonly("q", &Scope::q);

  py::class_<CorrectionTask>(module, "CorrectionTask")
      .def(py::init<LoraPair, csulora::Subspace, Attenuation, std::string, std::optional<Scope>>(), "pair"_a,
           "subspace"_a, "attenuation"_a, "label"_a = "update", "scope"_a = py::none())
      .def_readonly("pair", &CorrectionTask::pair)
      .def_readonly("subspace", &CorrectionTask::subspace)
      .def_readonly("attenuation", &CorrectionTask::attenuation)
      .def_readonly("label", &CorrectionTask::label)
      .def_readonly("scope", &CorrectionTask::scope);

  py::class_<Correction>(module, "Correction")
      .def(py::init<LoraPair, Parts, Parts, double, double, double, double>(), "pair"_a, "energies"_a, "gains"_a,
           "norm"_a, "change"_a, "undo"_a, "lost"_a)
      .def_readonly("pair", &Correction::pair)
      .def_readonly("energies", &Correction::energies)
      .def_readonly("gains", &Correction::gains)
      .def_readonly("norm", &Correction::norm)
      .def_readonly("change", &Correction::change)
      .def_readonly("undo", &Correction::undo)
      .def_readonly("lost", &Correction::lost);

  module.def("correct",
             py::overload_cast<const std::vector<CorrectionTask>&, const CorrectionOptions&>(&csulora::correct),
             "tasks"_a, "options"_a = CorrectionOptions{}, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  py::register_local_exception_translator(&translate);
  register_subspace(module);
  register_correction(module);
}
