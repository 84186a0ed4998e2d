"""Says whether this installation works, and with which hosts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

from csulora import __version__
from csulora.device import gpu_usable
from csulora.native import CUDA, TORCH_VERSION, _core
from csulora.views.tables import plain_table

_HOSTS = ("peft", "transformers", "vllm", "llama-cpp-python")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; ``ok`` is None where nothing is wrong with either answer."""

    what: str
    value: str
    ok: bool | None


def table(findings: Iterable[Finding]) -> Table:
    """One row per finding."""
    rows = plain_table("what", "found", "")
    for finding in findings:
        rows.add_row(finding.what, finding.value, {True: "ok", False: "WRONG", None: ""}[finding.ok])
    return rows


def examine() -> list[Finding]:
    """Check versions, run the core once, and look for the hosts csulora works with."""
    return [
        Finding("csulora", __version__, None),
        Finding("torch", f"{torch.__version__} (core built for {TORCH_VERSION})", True),
        Finding("GPU", _gpu(), None),
        Finding("threads", str(torch.get_num_threads()), None),
        Finding("CPU", torch.backends.cpu.get_cpu_capability(), None),
        _self_test(),
        *(Finding(host, _installed(host), None) for host in _HOSTS),
    ]


def _self_test() -> Finding:
    """Extract the subspace of a rank-1 displacement and remove it from an update that undoes it."""
    direction = torch.full((64, 1), 0.125)
    base, aligned = torch.zeros(64, 64), direction @ direction.t()
    options = _core.ExtractOptions()
    options.rank = 1
    subspace = _core.extract_subspace(base, aligned, options)
    task = _core.CorrectionTask(
        _core.LoraFactors(-direction, direction.t()), subspace, _core.Penalties(float("inf"), 0.0, 0.0)
    )
    (result,) = _core.correct([task])
    left = float((result.factors.b @ result.factors.a).norm())
    ok = abs(result.undo - 1) < 1e-3 and left < 1e-3
    return Finding("self-test", "extracts and corrects" if ok else "wrong result; please report it", ok)


def _gpu() -> str:
    if gpu_usable():
        return torch.cuda.get_device_name()
    return "none found" if CUDA else "not used: this build computes on the CPU"


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
