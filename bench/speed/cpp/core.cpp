// The C++ core at the shapes of known models: one matrix per distinct shape for extraction, one layer for correction.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <csulora/correct.h>
#include <csulora/extract.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

using Shape = std::pair<int64_t, int64_t>;  // (out, in)

constexpr int64_t kDirections = 64;
constexpr int64_t kRank = 16;

struct Model {
  const char* name;
  std::vector<Shape> layer;  // attention, then MLP, as often as a layer has them
};

const std::vector<Model>& models() {
  static const std::vector<Model> all{
      {"SmolLM2-135M", {{576, 576}, {192, 576}, {192, 576}, {576, 576}, {1536, 576}, {1536, 576}, {576, 1536}}},
      {"Llama-3-8B",
       {{4096, 4096}, {1024, 4096}, {1024, 4096}, {4096, 4096}, {14336, 4096}, {14336, 4096}, {4096, 14336}}},
      {"Llama-3-70B",
       {{8192, 8192}, {1024, 8192}, {1024, 8192}, {8192, 8192}, {28672, 8192}, {28672, 8192}, {8192, 28672}}},
      // Attention and one of the eight experts.
      {"Mixtral-8x7B",
       {{4096, 4096}, {1024, 4096}, {1024, 4096}, {4096, 4096}, {14336, 4096}, {4096, 14336}, {14336, 4096}}},
  };
  return all;
}

/// A displacement of falling spectrum i^-1/2, 256 values, and a little noise behind them.
at::Tensor displacement(const Shape& shape) {
  constexpr int64_t kSignals = 256;
  const auto [rows, columns] = shape;
  const auto left = at::randn({rows, kSignals}).div_(std::sqrt(rows));
  const auto right = at::randn({kSignals, columns}).div_(std::sqrt(columns));
  return at::randn({rows, columns}).mul_(1e-5).addmm_(left * at::arange(1, kSignals + 1).rsqrt(), right);
}

void extract(benchmark::State& state, const Shape& shape) {
  at::manual_seed(0);
  const auto base = at::randn({shape.first, shape.second}).mul_(0.02).to(at::kBFloat16);
  const auto aligned = base.to(at::kFloat).add_(displacement(shape)).to(at::kBFloat16);
  csulora::ExtractOptions options;
  options.rank = kDirections;
  options.keep_noise = true;
  csulora::Certificate certificate;
  for ([[maybe_unused]] auto _ : state) {
    certificate = csulora::extract_subspace(base, aligned, options).certificate;
  }
  state.counters["passes"] = static_cast<double>(certificate.passes);
  state.counters["subspace_error"] = certificate.subspace_error;
}

at::Tensor basis(int64_t size) { return std::get<0>(at::linalg_qr(at::randn({size, kDirections}))).to(at::kHalf); }

void correct(benchmark::State& state, const std::vector<Shape>& layer) {
  at::manual_seed(0);
  std::vector<csulora::CorrectionTask> tasks;
  for (const auto& [rows, columns] : layer) {
    const csulora::LoraFactors factors{at::randn({rows, kRank}).div_(std::sqrt(rows)).to(at::kHalf),
                                       at::randn({kRank, columns}).div_(std::sqrt(columns)).to(at::kHalf)};
    const csulora::Subspace subspace{basis(rows), at::arange(kDirections, 0, -1).to(at::kFloat), basis(columns)};
    tasks.push_back({factors, subspace, csulora::Penalties{}});
  }
  for ([[maybe_unused]] auto _ : state) {
    benchmark::DoNotOptimize(csulora::correct(tasks));
  }
}

void register_all() {
  for (const auto& model : models()) {
    std::vector<Shape> seen;
    for (const auto& shape : model.layer) {
      if (std::find(seen.begin(), seen.end(), shape) == seen.end()) {
        seen.push_back(shape);
        const auto name = c10::str("extract/", model.name, "/", shape.first, "x", shape.second);
        benchmark::RegisterBenchmark(name.c_str(), extract, shape)->Unit(benchmark::kMillisecond)->UseRealTime();
      }
    }
    const auto name = c10::str("correct_layer/", model.name);
    benchmark::RegisterBenchmark(name.c_str(), correct, model.layer)->Unit(benchmark::kMillisecond)->UseRealTime();
  }
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  register_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
