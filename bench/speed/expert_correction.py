"""Correction of an adapter with a pair of factors for every expert matrix of a model of Qwen3-30B-A3B's shape.

    python bench/speed/expert_correction.py [--layers 48] [--repetitions 3] [--json FILE]

48 layers of 128 experts with three projections are 18,432 matrices of 768 x 2048 and 2048 x 768. The adapter has rank
16, as PEFT fuses it and per expert; the subspace file has 16 directions for each matrix and is written to a temporary
directory (1.7 GB, removed after). Factors are in memory, and the subspace file is mapped and in the page cache.
The first correction with a subspace file also validates its factors, and is timed apart from the later ones. In the
first layer every tenth matrix must agree with the formula, computed in float64 on the dense update, before anything is
timed.
On a machine that others use too, set OMP_WAIT_POLICY=PASSIVE: threads that wait would else spin, and count as busy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import machine, summary
from rich.console import Console
from rich.table import Table
from torch import Tensor

import csulora
from csulora.adapters import experts
from csulora.adapters.experts import DOWN, GATE, GATE_UP, UP
from csulora.adapters.lora import Adapter, LoraModule
from csulora.adapters.peft import directory as peft_directory
from csulora.subspace.certificate import Certificate
from csulora.subspace.expert_layout import ExpertLayout
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.provenance import Provenance
from csulora.subspace.subspace import Subspace

HIDDEN, WIDTH, EXPERTS, RANK, DIRECTIONS = 2048, 768, 128, 16, 16
SHAPES = {GATE: (WIDTH, HIDDEN), UP: (WIDTH, HIDDEN), DOWN: (HIDDEN, WIDTH)}
PENALTY = 1.0
CHECKED = 10  # of so many matrices, one is compared with the formula
AGREEMENT = 1e-2  # relative to |X|; what is written is bfloat16
MOST_SECONDS = 10.0


def experts_modules(layers: int) -> list[str]:
    """Return the modules that hold experts, one per layer."""
    return [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]


def write_subspace(path: Path, layers: int) -> None:
    """Write a subspace file; modules of one shape have few different bases, and memory of their own on disk."""
    generator = torch.Generator().manual_seed(0)
    bases = {
        size: [torch.linalg.qr(torch.randn(size, DIRECTIONS, generator=generator))[0].half() for _ in range(4)]
        for size in (HIDDEN, WIDTH)
    }
    values = torch.arange(1, DIRECTIONS + 1).rsqrt()
    certificate = Certificate(float(values.square().sum()), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, DIRECTIONS, 0)
    names = [
        (f"{owner}.{expert}.{projection}", shape)
        for owner in experts_modules(layers)
        for expert in range(EXPERTS)
        for projection, shape in SHAPES.items()
    ]
    hashes = "0" * 64, "1" * 64
    modules = {
        name: ModuleSubspace(
            bases[rows][at % 4].clone(), values.clone(), bases[columns][(at + 1) % 4].clone(), certificate, *hashes
        )
        for at, (name, (rows, columns)) in enumerate(names)
    }
    layout = ExpertLayout(per_expert=True)
    Subspace(modules, Provenance("bench", "base", "aligned", {}, {}, experts=layout)).save(path)


def fused_adapter(layers: int) -> Adapter:
    """Return an adapter as PEFT fuses it, as a reader returns it: gate and up share A."""
    generator = torch.Generator().manual_seed(1)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).bfloat16()

    tensors: dict[str, Tensor] = {}
    for owner in experts_modules(layers):
        name = f"base_model.model.{owner}"
        tensors[f"{name}.base_layer.lora_A.weight"] = gaussian(EXPERTS * RANK, HIDDEN)
        tensors[f"{name}.base_layer.lora_B.weight"] = gaussian(2 * WIDTH, EXPERTS * RANK)
        tensors[f"{name}.lora_A.weight"] = gaussian(EXPERTS * RANK, WIDTH)
        tensors[f"{name}.lora_B.weight"] = gaussian(HIDDEN, EXPERTS * RANK)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": []}
    config |= {"target_parameters": [f"mlp.experts.{GATE_UP}", f"mlp.experts.{DOWN}"]}
    return peft_directory.parse(config, tensors, Path("fused"), "0" * 64)


def adapter_per_expert(layers: int) -> Adapter:
    """Return an adapter of transformers 4: a pair of factors for each matrix."""
    generator = torch.Generator().manual_seed(2)
    modules = {
        f"{owner}.{expert}.{projection}": LoraModule(
            torch.randn(rows, RANK, generator=generator).bfloat16(),
            torch.randn(RANK, columns, generator=generator).bfloat16(),
        )
        for owner in experts_modules(layers)
        for expert in range(EXPERTS)
        for projection, (rows, columns) in SHAPES.items()
    }
    return Adapter(modules, {"target_modules": list(SHAPES)}, Path("per-expert"), "0" * 64)


def check_agreement(raw: Adapter, subspace: Subspace) -> None:
    """Exit unless every tenth matrix of the first layer agrees with the dense formula, its rank not cut."""
    (owner,) = experts_modules(1)
    layer = replace(raw, modules={name: m for name, m in raw.modules.items() if name.startswith(f"{owner}.")})
    fixed, _ = csulora.correct(layer, subspace, csulora.Policy.csulora(PENALTY, rank="exact"))
    for name, module in list(layer.modules.items())[::CHECKED]:
        update = module.b.double() @ module.a.double()
        u, v = subspace[name].u.double(), subspace[name].v.double()
        read, written = (update @ v) @ v.t(), u @ (u.t() @ update)
        aligned = u @ (u.t() @ read)
        partial = read + written - 2 * aligned
        parts = partial, update - aligned - partial
        energies = [part.square().sum() / update.square().sum() for part in parts]
        expected = aligned + sum(part / (1 + PENALTY * e) for part, e in zip(parts, energies, strict=True))
        found = fixed.modules[name].b.double() @ fixed.modules[name].a.double()
        if (error := float((found - expected).norm() / expected.norm())) > AGREEMENT:
            raise SystemExit(f"{name} is off by {error:.2e}")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds of the clock, and of all cores together."""
    clock, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - busy


def measure(adapter: Adapter, path: Path, repetitions: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what opening, the first correction, later ones and encoding of their result took."""
    opened: list[Subspace] = []
    yield "open", _summary([timed(lambda: opened.append(Subspace.open(path)))])
    subspace, policy = opened[0], csulora.Policy.csulora(PENALTY)
    if not experts.is_fused(adapter):
        check_agreement(adapter, Subspace.open(path))
    results: list[Adapter] = []

    def run() -> None:
        results[:] = [csulora.correct(adapter, subspace, policy)[0]]

    yield "correct, first", _summary([timed(run)])
    yield "correct, later", _summary([timed(run) for _ in range(repetitions)])
    yield "encode", _summary([timed(lambda: peft_directory.tensors_of(results[0])) for _ in range(repetitions)])


def _summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    clock, busy = zip(*times, strict=True)
    return {"clock_seconds": summary(list(clock)), "cpu_seconds": summary(list(busy))}


def main() -> int:
    """Measure, print, write, and say whether the promise holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()

    matrices = arguments.layers * EXPERTS * len(SHAPES)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="csulora-experts-") as temporary:
        path = Path(temporary) / "subspace.safetensors"
        write_subspace(path, arguments.layers)
        size = path.stat().st_size
        for layout, make in (("fused", fused_adapter), ("per-expert", adapter_per_expert)):
            adapter = make(arguments.layers)
            runs[layout] = dict(measure(adapter, path, arguments.repetitions))
    table = Table(
        "layout", "step", "seconds", "CPU seconds", title=f"{matrices} matrices, {size / 1e9:.2f} GB subspace"
    )
    for layout, steps in runs.items():
        for step, times in steps.items():
            table.add_row(layout, step, *(f"{times[kind]['median']:.2f}" for kind in ("clock_seconds", "cpu_seconds")))
    Console().print(table)
    if arguments.json:
        result = {"machine": machine(), "matrices": matrices, "rank": RANK, "directions": DIRECTIONS}
        result |= {"subspace_file_bytes": size, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"), "runs": runs}
        result["peak_resident_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(steps["correct, later"]["clock_seconds"]["median"] > MOST_SECONDS for steps in runs.values()))


if __name__ == "__main__":
    raise SystemExit(main())
