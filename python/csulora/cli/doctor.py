"""Says whether this installation works, and with which hosts. What is missing is a finding, not an error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import requires
from types import ModuleType

import typer
from packaging.requirements import Requirement
from packaging.version import Version
from rich.table import Table

from csulora import __version__
from csulora.cli import exit_codes
from csulora.cli.arguments import Json, Quiet
from csulora.cli.console import deliver
from csulora.cores import carried
from csulora.errors import BuildError
from csulora.hooks.hosts import HOSTS, PEFT, TRANSFORMERS, Host
from csulora.views.tables import plain_table


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
        *_torch(),
        *map(_host, HOSTS),
    ]


def _torch() -> list[Finding]:
    """Report torch and the core, or which of the two is missing and the command that mends it."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of its own is missing
        needed = next(found for found in requires("csulora") or ["torch"] if found.startswith("torch"))
        return [Finding("torch", f"cannot be imported ({error}); install it: pip install '{needed}'", False)]
    findings = [
        Finding("torch", torch.__version__, None),
        Finding("threads", str(torch.get_num_threads()), None),
        Finding("CPU", torch.backends.cpu.get_cpu_capability(), None),
    ]
    try:
        from csulora import native
    except BuildError as error:
        return [*findings, Finding("core", str(error), False)]
    return [
        *findings,
        Finding("core", f"built for torch {native._core.TORCH_VERSION}", True),
        Finding("cores carried", f"for torch {', '.join(carried())}", None),
        Finding("GPU", _gpu(), None),
        _self_test(native),
    ]


def _self_test(native: ModuleType) -> Finding:
    """Extract the subspace of a rank-1 displacement and remove it from an update that undoes it."""
    import torch

    core = native._core
    direction = torch.full((64, 1), 0.125)
    base, aligned = torch.zeros(64, 64), direction @ direction.t()
    options = core.ExtractOptions()
    options.rank = 1
    subspace = core.extract_subspace(base, aligned, options)
    task = core.CorrectionTask(
        core.LoraFactors(-direction, direction.t()), subspace, core.Penalties(float("inf"), 0.0, 0.0)
    )
    (result,) = core.correct([task])
    left = float((result.factors.b @ result.factors.a).norm())
    ok = abs(result.undo - 1) < 1e-3 and left < 1e-3
    return Finding("self-test", "extracts and corrects" if ok else "wrong result; please report it", ok)


def _gpu() -> str:
    import torch

    from csulora.device import gpu_usable

    if gpu_usable():
        return torch.cuda.get_device_name()
    if not torch.cuda.is_available():
        return "none found"
    return f"{torch.cuda.get_device_name()}, not used: this core computes on the CPU; build one from source with nvcc"


def _host(host: Host) -> Finding:
    """Report a host: its version, what was run of that, and what to install where csulora does not work with it."""
    found = host.installed()
    if found is None:
        return Finding(host.name, f"not installed; csulora is tested with {' and '.join(host.series)}", None)
    distribution, version = found
    wanted = _wanted(host, distribution)
    if misfit := _misfit(host, version):
        return Finding(host.name, f"{version}: not supported: {misfit}", None)
    if series := host.series_of(version):
        return Finding(host.name, f"{version}, series {series}: {host.series[series].run}", True)
    if Requirement(wanted).specifier.contains(version, prereleases=True):
        return Finding(host.name, f"{version}: supported, but not run in csulora's tests", True)
    return Finding(host.name, f"{version}: not supported; install one that is: pip install '{wanted}'", None)


def _wanted(host: Host, distribution: str) -> str:
    """Return what pip is to install: as an extra of csulora says, else of the first series that is known."""
    extras = {Requirement(line).name: Requirement(line) for line in requires("csulora") or []}
    if distribution in extras:
        return f"{distribution}{extras[distribution].specifier}"
    return f"{distribution}=={next(iter(host.series))}.*"


def _misfit(host: Host, version: str) -> str | None:
    """Say why transformers does not work with the PEFT that is there, if it does not."""
    peft = PEFT.installed()
    if host is not TRANSFORMERS or peft is None or Version(version) < Version("5.24"):
        return None
    if Version(peft[1]) >= Version("0.22"):
        return None
    return f"it wants PEFT 0.22, and PEFT {peft[1]} is installed; run: pip install 'transformers>=5.0,<5.24'"


def doctor(json: Json = None, quiet: Quiet = False) -> None:
    """Check this installation."""
    findings = examine()
    works = all(finding.ok is not False for finding in findings)
    document = {"findings": [asdict(finding) for finding in findings]}
    summary = "this installation works" if works else "this installation does not work"
    deliver(table(findings), summary, document, json, quiet)
    if not works:
        raise typer.Exit(exit_codes.BAD_INPUT)
