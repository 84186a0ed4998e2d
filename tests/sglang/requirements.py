"""Prints what the installed SGLang requires and a CPU can use: without torch, and without kernels for GPUs."""

from importlib.metadata import requires

from packaging.requirements import Requirement

# Each is gigabytes, or fails to install where there is no GPU; SGLang imports none of them on a CPU.
GPU_ONLY = {
    "cuda-python",
    "decord2",
    "deepseek-recipe",
    "flash-attn-4",
    "flashinfer-python",
    "humming-kernels",
    "nvidia-cutlass-dsl",
    "nvidia-mathdx",
    "nvshmem4py-cu13",
    "quack-kernels",
    "sgl-deep-ep",
    "sgl-deep-gemm",
    "sgl-flash-mla",
    "sglang-kernel",
    "smg-grpc-servicer",
    "tilelang",
    "tml-renderers",
    "torch-memory-saver",
}

print("dill")  # an import that SGLang does not declare
for line in requires("sglang") or []:
    requirement = Requirement(line)
    name = requirement.name.lower().replace("_", "-")
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and name not in GPU_ONLY and not name.startswith("torch"):
        requirement.marker = None
        print(requirement)
