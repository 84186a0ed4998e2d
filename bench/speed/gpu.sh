#!/usr/bin/env bash
# Builds csulora with CUDA, tests it and measures it on a machine with a GPU and no network.
#
#   bench/speed/gpu.sh collect [DIR]   beforehand, on a machine with a network: the packages that the other one lacks
#   bench/speed/gpu.sh run [DIR]       on the machine with the GPU: uses DIR alone, writes bench/results/speed/gpu_*.json
#
# The machine needs python3 with a CUDA build of torch, nvcc, g++ and git. What else it may lack is collected: csulora's
# small dependencies, the build tools, pytest. CUDA_LIBRARIES=1 collects cuBLAS and cuSOLVER too, some 600 MB, which torch's
# CUDA packages bring by themselves. PYTHON_VERSION is the GPU machine's, 3.12 if not given.
# `run` takes less than 8 minutes: each step has a limit, and a step that fails or runs out does not stop the next ones, but
# fails the run. What measures comes before what tests. compute-sanitizer gets the time that is left, and fails nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."

action="${1:-}"
packages="${2:-build/gpu/packages}"
site="$PWD/build/gpu/site"
failed=()

collect() {
  local wanted=(gguf jinja2 tomli-w safetensors huggingface-hub typer rich hypothesis pytest scikit-build-core pybind11 cmake ninja)
  local platforms=()
  for glibc in 17 28; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
  local pip=(python3 -m pip --disable-pip-version-check download --quiet --only-binary=:all: --dest "$packages"
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64)
  "${pip[@]}" "${wanted[@]}"
  if [ "${CUDA_LIBRARIES:-0}" = 1 ]; then
    "${pip[@]}" --no-deps nvidia-cublas==13.1.1.3 nvidia-cusolver==12.0.4.66 nvidia-cusparse==12.6.3.3 nvidia-nvjitlink==13.0.88
  fi
  ls -sh "$packages"
}

# attempt NAME SECONDS COMMAND...
attempt() {
  local name="$1" limit="$2" start=$SECONDS
  shift 2
  echo "== $name"
  if timeout --kill-after=10 "$limit" "$@"; then
    echo "== $name: done in $((SECONDS - start)) s"
  else
    echo "== $name: FAILED after $((SECONDS - start)) s"
    return 1
  fi
}

step() { attempt "$@" || failed+=("$1"); }

# Only what python3 does not have already, so that torch's own packages stay. All at once, into an empty folder: pip adds
# no programs to a bin/ that is there.
install_missing() {
  rm -rf "$site"
  mkdir -p "$site"
  python3 -c '
import importlib.metadata, pathlib, sys

for wheel in sys.argv[1:]:
    try:
        importlib.metadata.version(pathlib.Path(wheel).name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel, end="\0")
' "$packages"/*.whl | xargs --null --no-run-if-empty \
    python3 -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --target "$site"
}

# torch's directory is named, so that any version may be tried. Without --upgrade, by which pip would replace bin/ and the
# build tools in it. cuSOLVER may lie where only the linker found it: torch does not load it at once.
build() {
  rm -rf "$site"/csulora*
  CUDAARCHS="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)" \
    CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
    python3 -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-build-isolation \
    --config-settings cmake.define.CSULORA_CUDA=ON --config-settings cmake.define.CMAKE_INSTALL_RPATH_USE_LINK_PATH=ON \
    --config-settings cmake.define.CSULORA_TORCH_DIR="$(python3 -c 'import torch; print(torch.__path__[0])')" \
    --config-settings build-dir=build/gpu/cmake --target "$site" .
  python3 -c "from csulora.device import gpu_usable; assert gpu_usable(), 'built without CUDA, or torch finds no GPU'"
}

run() {
  export PYTHONPATH="$site" PATH="$site/bin:$PATH" PYTHONUNBUFFERED=1
  export -f install_missing build
  export packages site
  local results=bench/results/speed tests=(python3 -m pytest -q -p no:cacheprovider -p no:randomly -k "cuda or test_device")
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo "nvidia-smi failed"
  step "install" 60 bash -euo pipefail -c install_missing
  step "build" 120 bash -euo pipefail -c build
  step "correction, r 16, k 64" 50 python3 bench/speed/gpu/correct.py --json "$results/gpu_correction.json"
  step "extraction" 70 python3 bench/speed/gpu/extract.py --json "$results/gpu_extraction.json"
  step "correction, r 64, k 256" 40 python3 bench/speed/gpu/correct.py --rank 64 --directions 256 --repeats 4 --eager-layers 2 \
    --json "$results/gpu_correction_r64_k256.json"
  step "tests" 100 "${tests[@]}" tests/python/native tests/python/test_device.py
  if command -v compute-sanitizer >/dev/null && [ "$SECONDS" -lt 440 ]; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 attempt "compute-sanitizer, four tests" "$((460 - SECONDS))" \
      compute-sanitizer --error-exitcode 1 --target-processes all "${tests[@]}" tests/python/native tests/python/test_device.py \
      -k "cuda and (uneven and graded and dense or small_matrices_get) or gpu_is_corrected" || true
  else
    echo "== compute-sanitizer: not installed here, or no time is left"
  fi
  echo "all steps took $SECONDS s"
  if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
  fi
}

case "$action" in
  collect) collect ;;
  run) run ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
