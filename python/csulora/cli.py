"""The command line: `csulora extract | verify | inspect | correct | export | doctor`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import csulora
from csulora import doctor as doctor_module
from csulora import tables
from csulora.errors import CsuloraError, RefusedError
from csulora.files import to_json, write_text
from csulora.gate import Gate
from csulora.guard import DirectoryGuard
from csulora.pair import Progress as ReportProgress
from csulora.policy import Policy

EXIT_REFUSED = 3
EXIT_BAD_INPUT = 4
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="csulora",
    help="Correct trained LoRA adapters so that a model's safety alignment survives them.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    """Storage types of factors."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"


class Preset(StrEnum):
    """Named penalties (aligned, partial, off)."""

    csulora = "csulora"
    protect = "protect"
    project = "project"
    none = "none"

    def policy(self) -> Policy:
        """Return the preset's policy."""
        policy: Policy = getattr(Policy, self.value)()
        return policy


class Uncovered(StrEnum):
    """What happens to modules that the pack does not cover."""

    refuse = "refuse"
    drop = "drop"
    keep = "keep"


class Format(StrEnum):
    """Adapter formats that can be written."""

    peft = "peft"
    gguf = "gguf"


BaseModel = Annotated[
    Path | None,
    typer.Option("--base-model", metavar="DIR|GGUF", help="Model of a GGUF adapter that is read or written."),
]
Outtype = Annotated[Dtype | None, typer.Option(help="Type of a GGUF file's tensors. [default: the adapter's]")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON to this file; - for stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="Checkpoint before alignment: a directory, a GGUF file or a hub id.")],
    aligned: Annotated[str, typer.Argument(help="Checkpoint after alignment.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Pack file to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Directions per module. [default: 64]")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep the fewest directions that capture this share of |D|^2.")
    ] = None,
    max_rank: Annotated[int, typer.Option(min=1, help="Most directions per module with --energy.")] = 256,
    modules: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Modules to extract; repeatable. [default: attention and MLP]"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Storage type of the factors.")] = Dtype.f16,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random start block.")] = 0,
    keep_noise: Annotated[
        bool, typer.Option("--keep-noise", help="Keep directions below the checkpoints' storage rounding.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Estimate the subspace in which alignment moved each weight matrix."""
    if rank is not None and energy is not None:
        raise typer.BadParameter("give --rank or --energy (with --max-rank), not both")
    with _progress("extracting", quiet) as progress:
        pack = csulora.extract(
            base,
            aligned,
            output=output,
            progress=progress,
            rank=rank or 64,
            energy=energy,
            max_rank=max_rank,
            modules=modules or [],
            dtype=dtype.value,
            device=device.value,
            seed=seed,
            keep_noise=keep_noise,
        )
    _show(tables.pack_table(pack), quiet)
    _say(f"{output}: {len(pack)} modules, sha256 {pack.sha256}", quiet)
    _write_json(json, pack.to_dict())


@app.command()
def verify(
    pack: Annotated[Path, typer.Argument(help="Pack file.")],
    base: Annotated[str, typer.Argument(help="Checkpoint before alignment.")],
    aligned: Annotated[str, typer.Argument(help="Checkpoint after alignment.")],
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Recompute a pack's certificates from its checkpoints."""
    subspace = csulora.Subspace.open(pack)
    with _progress("verifying", quiet) as progress:
        results = csulora.verify(subspace, base, aligned, progress)
    failed = [result for result in results if not result.holds]
    _show(tables.verification_table(failed or results), quiet)
    _write_json(json, {"modules": [asdict(result) | {"holds": result.holds} for result in results]})
    if failed:
        reason = "is better than what was measured" if failed[0].same_weights else "is for other weights"
        raise RefusedError(
            f"{pack}: {len(failed)} of {len(results)} certificates do not hold; that of {failed[0].module} {reason}"
        )
    _say(f"{pack}: all {len(results)} certificates hold", quiet)


@app.command()
def inspect(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT adapter directories or GGUF LoRA files.")
    ],
    subspace: Annotated[Path | None, typer.Option(help="Pack of the model the adapters are for.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="Factor of each adapter in the sum. [default: 1 each]")
    ] = None,
    max_undo: Annotated[
        float | None, typer.Option(help="Refuse if a module undoes more than this share of its alignment.")
    ] = None,
    base_model: BaseModel = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Show what an adapter does, and with --subspace where its update lies and what it undoes.

    Several adapters are taken as applied together: what is shown is their sum.
    """
    loaded = [csulora.load_adapter(adapter, base_model) for adapter in adapters]
    if subspace is None:
        if len(loaded) > 1 or weights is not None or max_undo is not None:
            raise typer.BadParameter("sums and limits need --subspace")
        _show(tables.adapter_table(loaded[0]), quiet)
        _write_json(json, {"adapter_sha256": loaded[0].sha256, "modules": tables.adapter_rows(loaded[0])})
        return
    pack = csulora.Subspace.open(subspace)
    whole = loaded[0] if len(loaded) == 1 and weights is None else csulora.combine(loaded, pack, _numbers(weights))
    _, report = csulora.correct(whole, pack, Policy.none(uncovered="keep", max_undo=max_undo))
    _show(report.table(), quiet)
    _write_json(json, report.to_dict())


@app.command()
def correct(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    subspace: Annotated[Path, typer.Option(help="Pack of the model the adapter is for.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, or GGUF file.")],
    preset: Annotated[Preset | None, typer.Option(help="Named penalties. [default: csulora]")] = None,
    aligned: Annotated[float | None, typer.Option(help="Penalty on the aligned part; inf removes it.")] = None,
    partial: Annotated[float | None, typer.Option(help="Penalty on the partially aligned part.")] = None,
    off: Annotated[float | None, typer.Option(help="Penalty on the off-subspace part.")] = None,
    rank: Annotated[str | None, typer.Option(help="keep, exact or a number. [default: keep]")] = None,
    uncovered: Annotated[Uncovered | None, typer.Option(help="Modules outside the pack. [default: refuse]")] = None,
    max_undo: Annotated[
        float | None, typer.Option(help="Refuse if a module undoes more than this share of its alignment.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy (TOML); other options override it.")] = None,
    format: Annotated[Format, typer.Option(help="Format to write.")] = Format.peft,
    base_model: BaseModel = None,
    outtype: Outtype = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write the corrected adapter, or refuse it with the reason."""
    if policy is not None and preset is not None:
        raise typer.BadParameter("give --policy or --preset, not both")
    if format is Format.gguf and base_model is None:
        raise typer.BadParameter("--format gguf needs the model that llama.cpp will run: --base-model")
    if format is not Format.gguf and outtype is not None:
        raise typer.BadParameter("--outtype is for --format gguf")
    start = Policy.load(policy) if policy else (preset or Preset.csulora).policy()
    changes = {
        "aligned": aligned,
        "partial": partial,
        "off": off,
        "rank": _parse_rank(rank),
        "uncovered": uncovered.value if uncovered else None,
        "max_undo": max_undo,
    }
    chosen = replace(start, **{key: value for key, value in changes.items() if value is not None})
    loaded = csulora.load_adapter(adapter, base_model)
    fixed, report = csulora.correct(loaded, csulora.Subspace.open(subspace), chosen)
    csulora.save_adapter(fixed, output, format.value, base_model=base_model, outtype=outtype and outtype.value)
    _show(report.table(), quiet)
    _say(f"{output}: {len(report.measured)} of {len(report.modules)} modules corrected", quiet)
    _write_json(json, report.to_dict())


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.")],
    base_model: Annotated[
        Path, typer.Option(metavar="DIR|GGUF", help="The model that llama.cpp will run with the adapter.")
    ],
    outtype: Outtype = None,
    quiet: Quiet = False,
) -> None:
    """Write an adapter as a GGUF LoRA file for llama.cpp, uncorrected."""
    loaded = csulora.load_adapter(adapter, base_model)
    csulora.save_adapter(loaded, output, "gguf", base_model=base_model, outtype=outtype and outtype.value)
    _say(f"{output}: {len(loaded.modules)} modules, uncorrected", quiet)


@app.command()
def guard(
    incoming: Annotated[Path, typer.Argument(help="Directory that adapters are uploaded to.")],
    outgoing: Annotated[Path, typer.Argument(help="Directory for the corrected ones; point the server here.")],
    subspace: Annotated[Path, typer.Option(help="Pack of the served model.")],
    policy: Annotated[Path | None, typer.Option(help="Policy (TOML). [default: the preset csulora]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until SIGTERM or SIGINT.")] = False,
    settle: Annotated[float, typer.Option(min=0, help="Seconds an upload must not change before it is read.")] = 2.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds until an unreadable upload is refused.")] = 60.0,
    decisions: Annotated[Path | None, typer.Option(help="Append a JSON line per decision to this file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Correct or refuse every adapter that appears in a directory."""
    worker = DirectoryGuard(
        incoming, outgoing, Gate.open(subspace, policy, decisions), settle, patience, lambda line: _say(line, quiet)
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    _say(f"guarding {incoming} -> {outgoing}: pack {worker.gate.pack.sha256}", quiet)
    worker.run(watch)


@app.command()
def doctor(json: Json = None, quiet: Quiet = False) -> None:
    """Check this installation."""
    findings = doctor_module.examine()
    _show(tables.doctor_table(findings), quiet)
    _write_json(json, {"findings": [asdict(finding) for finding in findings]})
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; every error csulora raises becomes one line on stderr and an exit code."""
    try:
        app()
    except RefusedError as error:
        _fail("refused", error, EXIT_REFUSED)
    except (CsuloraError, OSError) as error:
        _fail("error", error, EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _fail("interrupted", "finished modules are kept; run the same command to continue", EXIT_INTERRUPTED)


def _fail(kind: str, reason: object, code: int) -> None:
    print(f"csulora: {kind}: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(code)


def _parse_rank(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() else text


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,0.5") from None


def _show(table: RenderableType, quiet: bool) -> None:
    if not quiet:
        # A pipe has no width of its own; wide enough that no table wraps.
        Console(width=None if sys.stdout.isatty() else 160).print(table)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, flush=True)


def _write_json(path: Path | None, document: dict[str, Any]) -> None:
    if path is None:
        return
    text = to_json(document)
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        write_text(path, text)


@contextmanager
def _progress(verb: str, quiet: bool) -> Iterator[ReportProgress | None]:
    """Yield a callback that draws a progress bar on stderr, or None where nobody would see it."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None)

        def report(module: str, done: int, total: int) -> None:
            bar.update(task, description=f"{verb} {module}", completed=done, total=total)

        yield report
