"""The command line: `csulora extract | verify | inspect | correct | tune | guard | export | doctor`.

No command imports torch before its arguments are known to be right, so that help and usage errors come at once.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import csulora
from csulora.cli import doctor as doctor_module
from csulora.cli.arguments import (
    BaseModel,
    Device,
    Dtype,
    Format,
    Json,
    Outtype,
    Preset,
    Quiet,
    SubspaceSha256,
    Uncovered,
    check_output,
    check_outputs,
    numbers,
    parse_rank,
)
from csulora.cli.console import deliver, progress_bar
from csulora.cli.interruption import interruptible
from csulora.errors import CsuloraError, InputError, RefusedError, printable
from csulora.io.files import write_text
from csulora.policy.policy import Policy
from csulora.serving.variables import DECISIONS_VARIABLE, POLICY_VARIABLE, SUBSPACE_VARIABLE
from csulora.tuning.frontier import Frontier, frontier_path
from csulora.tuning.options import Options
from csulora.views import tables

if TYPE_CHECKING:
    from csulora.correction.audit import Check

EXIT_REFUSED = 3
EXIT_BAD_INPUT = 4

app = typer.Typer(
    name="csulora",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"csulora {csulora.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Correct trained LoRA adapters so that a model's safety alignment survives them."""


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="Checkpoint before alignment: a directory, a GGUF file or a hub id.")],
    aligned: Annotated[str, typer.Argument(help="Checkpoint after alignment.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Subspace file to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Directions per module. [default: 64]")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep the fewest directions that capture this share of |D|^2.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Most directions per module with --energy. [default: 256]")
    ] = None,
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
    """Estimate the subspace in which alignment moved each weight matrix.

    Under torchrun the processes share the modules, and the output must lie where all of them see it.
    """
    if rank is not None and energy is not None:
        raise typer.BadParameter("give --rank or --energy (with --max-rank), not both")
    if energy is not None and not 0 < energy <= 1:
        raise typer.BadParameter(f"--energy is {energy:g}; it must lie in (0, 1]")
    if max_rank is not None and energy is None:
        raise typer.BadParameter("--max-rank goes with --energy; without it give --rank")
    check_outputs([output, json], [base, aligned])
    from csulora.extraction.distributed import joined

    reason = "finished modules are kept; run the same command to continue"
    with (
        interruptible(reason),
        joined() as processes,
        progress_bar("extracting", quiet or not processes.is_first) as progress,
    ):
        subspace = csulora.extract(
            base,
            aligned,
            output=output,
            progress=progress,
            rank=rank or 64,
            energy=energy,
            max_rank=max_rank or 256,
            modules=modules or [],
            dtype=dtype.value,
            device=device.value,
            seed=seed,
            keep_noise=keep_noise,
            processes=processes,
        )
    if not processes.is_first:
        return
    summary = f"{output}: {len(subspace)} modules, sha256 {subspace.sha256}"
    deliver(tables.subspace_table(subspace), summary, subspace.to_dict(), json, quiet)


@app.command()
def verify(
    subject: Annotated[
        Path, typer.Argument(metavar="SUBSPACE|ADAPTER", help="Subspace file or corrected adapter directory.")
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCES...",
            help="What it was made from. Of a subspace file: the checkpoints before and after alignment. Of an "
            "adapter: the original adapter and the subspace file; without them only the adapter's content is compared "
            "with its report.",
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="Policy (TOML) that an adapter must have been corrected with. [default: what it states]"),
    ] = None,
    base_model: BaseModel = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Recompute a subspace file's certificates from its checkpoints, or a corrected adapter from its original."""
    if policy is not None and len(sources or ()) != 2:
        raise typer.BadParameter("--policy goes with ADAPTER ORIGINAL SUBSPACE")
    check_outputs([json], [subject, *(sources or ()), policy, base_model])
    if subject.is_dir() and len(sources or ()) in (0, 2):
        original, subspace = sources or (None, None)
        known = csulora.Subspace.open(subspace) if subspace else None
        checks = csulora.audit(subject, original, known, base_model, Policy.load(policy) if policy else None)
        _deliver_audit(subject, checks, json, quiet, is_complete=subspace is not None)
    elif not subject.is_dir() and sources and len(sources) == 2:
        _verify_subspace(subject, sources[0], sources[1], json, quiet)
    else:
        raise typer.BadParameter("give SUBSPACE BASE ALIGNED, or ADAPTER ORIGINAL SUBSPACE, or ADAPTER alone")


def _deliver_audit(adapter: Path, checks: list[Check], json: Path | None, quiet: bool, *, is_complete: bool) -> None:
    failed = [check for check in checks if not check.holds]
    whole = (
        "follows from its original"
        if is_complete
        else "is as it was written; name original and subspace file to make it again"
    )
    summary = f"{adapter}: {'does not hold' if failed else whole}"
    deliver(tables.audit_table(checks), summary, {"checks": [asdict(check) for check in checks]}, json, quiet)
    if failed:
        raise RefusedError(f"{adapter}: {failed[0].what}: {failed[0].stated} is stated, and {failed[0].found} is found")


def _verify_subspace(path: Path, base: str, aligned: str, json: Path | None, quiet: bool) -> None:
    subspace = csulora.Subspace.open(path)
    with progress_bar("verifying", quiet) as progress:
        results = csulora.verify(subspace, base, aligned, progress)
    failed = [result for result in results if not result.holds]
    summary = f"{path}: {len(results) - len(failed)} of {len(results)} certificates hold"
    document = {"modules": [asdict(result) | {"holds": result.holds} for result in results]}
    deliver(tables.verification_table(failed or results), summary, document, json, quiet)
    if failed:
        reason = "is better than what was measured" if failed[0].same_weights else "is for other weights"
        raise RefusedError(
            f"{path}: {len(failed)} of {len(results)} certificates do not hold; that of {failed[0].module} {reason}"
        )


@app.command()
def inspect(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT directories or GGUF LoRA files.")],
    subspace: Annotated[Path | None, typer.Option(help="Subspace file of the model the adapters are for.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="Factor of each adapter in the sum. [default: 1 each]")
    ] = None,
    max_undo: Annotated[
        float | None, typer.Option(help="Refuse if a module undoes more than this share of its alignment.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=check_output, help="Write a page with all figures as maps.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy (TOML) that the page shows. [default: the preset csulora]")
    ] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="What `csulora tune` measured. [default: what lies beside the policy]")
    ] = None,
    base_model: BaseModel = None,
    subspace_sha256: SubspaceSha256 = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Show what an adapter does, and with --subspace where its update lies and what it undoes.

    Several adapters are taken as applied together: what is shown is their sum.
    """
    if html is None and (policy is not None or frontier is not None):
        raise typer.BadParameter("--policy and --frontier are for --html")
    if max_undo is not None and not math.isfinite(max_undo):
        raise typer.BadParameter(f"--max-undo is {max_undo}; it must be a finite number")
    factors = numbers(weights)
    if factors is not None and len(factors) != len(adapters):
        raise typer.BadParameter(f"--weights has {len(factors)} numbers for {len(adapters)} adapters")
    check_outputs([html, json], [*adapters, subspace, policy, frontier, base_model])
    loaded = [csulora.load_adapter(adapter, base_model) for adapter in adapters]
    if subspace is None:
        if len(loaded) > 1 or weights is not None or max_undo is not None or html is not None:
            raise typer.BadParameter("sums, limits and pages need --subspace")
        document = {"adapter_sha256": loaded[0].sha256, "modules": tables.adapter_rows(loaded[0])}
        summary = f"{printable(adapters[0])}: {len(loaded[0].modules)} modules"
        deliver(tables.adapter_table(loaded[0]), summary, document, json, quiet)
        return
    opened = csulora.Subspace.open(subspace, subspace_sha256)
    whole = loaded[0] if len(loaded) == 1 and weights is None else csulora.combine(loaded, opened, factors)
    if html is not None:
        from csulora.views.html.page import render

        shown = Policy.load(policy) if policy else Policy.csulora()
        limited = shown if max_undo is None else replace(shown, max_undo=max_undo)
        write_text(html, render(whole, opened, limited, _load_frontier(frontier, policy)))
    _, report = csulora.correct(whole, opened, Policy.none(uncovered="keep", max_undo=max_undo))
    deliver(report.table(), f"{printable(whole.path)}: nothing was changed", report.to_dict(), json, quiet)


@app.command()
def correct(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    subspace: Annotated[Path, typer.Option(help="Subspace file of the model the adapter is for.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, or GGUF file.")],
    preset: Annotated[Preset | None, typer.Option(help="Named penalties. [default: csulora]")] = None,
    aligned: Annotated[float | None, typer.Option(help="Penalty on the aligned component; inf removes it.")] = None,
    partial: Annotated[float | None, typer.Option(help="Penalty on the partial component.")] = None,
    off: Annotated[float | None, typer.Option(help="Penalty on the off component.")] = None,
    rank: Annotated[str | None, typer.Option(help="keep, exact or a number. [default: keep]")] = None,
    uncovered: Annotated[
        Uncovered | None, typer.Option(help="Modules outside the subspace file. [default: refuse]")
    ] = None,
    max_undo: Annotated[
        float | None, typer.Option(help="Refuse if a module undoes more than this share of its alignment.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy (TOML); other options replace what it says, but no overrides.")
    ] = None,
    format: Annotated[Format, typer.Option(help="Format to write.")] = Format.peft,
    base_model: BaseModel = None,
    outtype: Outtype = None,
    subspace_sha256: SubspaceSha256 = None,
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
    check_outputs([output, json], [adapter, subspace, policy, base_model])
    start = Policy.load(policy) if policy else (preset or Preset.csulora).policy()
    if start.overrides and any(penalty is not None for penalty in (aligned, partial, off)):
        raise typer.BadParameter("--aligned, --partial and --off do not reach what the policy's overrides match")
    changes: dict[str, Any] = {
        "aligned": aligned,
        "partial": partial,
        "off": off,
        "rank": parse_rank(rank),
        "uncovered": uncovered.value if uncovered else None,
        "max_undo": max_undo,
    }
    try:
        chosen = replace(start, **{key: value for key, value in changes.items() if value is not None})
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    from csulora.adapters.lora import CORRECTED_SHA256

    loaded = csulora.load_adapter(adapter, base_model)
    fixed, report = csulora.correct(loaded, csulora.Subspace.open(subspace, subspace_sha256), chosen)
    sha256 = csulora.save_adapter(fixed, output, format.value, base_model=base_model, outtype=outtype and outtype.value)
    summary = (
        f"{output}: {report.warning}{len(report.measured)} of {len(report.modules)} modules corrected, sha256 {sha256}"
    )
    deliver(report.table(), summary, report.to_dict() | {CORRECTED_SHA256: sha256}, json, quiet)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="The aligned model: a directory or a hub id.")],
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT directories or GGUF LoRA files.")],
    subspace: Annotated[Path, typer.Option(help="Subspace file of the model.")],
    task: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Task prompts, to answer as the adapter does, not of its task alone; a file per adapter, in order.",
        ),
    ],
    safety: Annotated[Path, typer.Option(metavar="FILE", help="Safety prompts, to answer as the aligned model does.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Policy file (TOML) to write.")],
    general: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="General prompts, to be answered as before."),
    ] = None,
    for_others: Annotated[
        bool, typer.Option("--for-others", help="Fit one adapter's policy, too, for adapters to come.")
    ] = False,
    input_filters: Annotated[
        bool, typer.Option(help="Try input filters for safety prompts, too, for adapters to come.")
    ] = True,
    uncovered: Annotated[Uncovered, typer.Option(help="Modules outside the subspace file.")] = Uncovered.refuse,
    steps: Annotated[int, typer.Option(min=1, help="Most steps of a fit, for each adapter.")] = Options.steps,
    task_weight: Annotated[
        list[float] | None,
        typer.Option(
            min=0.1, max=1000, help="Weights of the task prompts to try. [default: 2, 8, 30; for adapters to come 1]"
        ),
    ] = None,
    refusal: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What refusals say, to count them and choose by them; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Most tokens of a reply that count.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the prompts.")] = 0,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.auto,
    base_model: BaseModel = None,
    subspace_sha256: SubspaceSha256 = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Fit a policy to prompts, and write the subspace file to use it with; several adapters get one policy for all.

    A file of prompts is text, one prompt a line, or chats as JSON lines. `tune` needs no reference replies.
    """
    from csulora.tuning import probes
    from csulora.tuning.request import Request
    from csulora.tuning.tune import subspace_path, tune

    inputs = [model, *adapters, subspace, *task, safety, general, base_model]
    check_outputs([output, frontier_path(output), subspace_path(output), json], inputs)
    if len(task) != len(adapters):
        raise typer.BadParameter(f"{len(adapters)} adapters need as many --task files, and {len(task)} are given")
    if not all(map(str.strip, refusal or ())):
        raise typer.BadParameter("--refusal is empty: every reply would count as a refusal")
    request = Request(
        model=model,
        adapters=[csulora.load_adapter(adapter, base_model) for adapter in adapters],
        subspace=csulora.Subspace.open(subspace, subspace_sha256),
        task=[probes.read(file) for file in task],
        safety=probes.read(safety),
        general=probes.read(general) if general else (),
        for_others=for_others,
        input_filters=input_filters,
        uncovered=uncovered.value,
        device=device.value,
        longest_reply=tokens,
        options=Options(steps=steps, seed=seed),
        task_weights=task_weight or (),
        refusals=refusal or (),
    )
    reason = "finished stages are kept; run the same command to continue"
    with interruptible(reason), progress_bar("tuning", quiet) as progress:
        frontier = tune(request, output, progress)
    effect = ", which corrects nothing" if frontier.written == "none" else ""
    summary = f"{frontier.verdict}\n{output}: {frontier.written}{effect}"
    if frontier.subspace_sha256 != request.subspace.sha256:
        summary += f"\n{subspace_path(output)}: the subspace file to use it with"
    deliver(tables.frontier_table(frontier), summary, frontier.to_dict(), json, quiet)


@app.command()
def guard(
    incoming: Annotated[Path, typer.Argument(help="Directory that adapters are uploaded to.")],
    outgoing: Annotated[Path, typer.Argument(help="Directory for the corrected ones; point the server here.")],
    subspace: Annotated[Path, typer.Option(help="Subspace file of the served model.")],
    policy: Annotated[Path | None, typer.Option(help="Policy (TOML). [default: the preset csulora]")] = None,
    base_model: BaseModel = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until SIGTERM or SIGINT.")] = False,
    settle: Annotated[float, typer.Option(min=0, help="Seconds an upload must not change before it is read.")] = 2.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds until an unreadable upload is refused.")] = 60.0,
    decisions: Annotated[Path | None, typer.Option(help="Append a JSON line per decision to this file.")] = None,
    subspace_sha256: SubspaceSha256 = None,
    quiet: Quiet = False,
) -> None:
    """Correct or refuse every adapter that appears in a directory."""
    from csulora.serving.gate import Gate
    from csulora.serving.guard import DirectoryGuard

    worker = DirectoryGuard(
        incoming,
        outgoing,
        Gate.open(subspace, policy, decisions, subspace_sha256),
        settle,
        patience,
        base_model,
        say=lambda line: None if quiet else print(line, flush=True),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    with interruptible("what was not finished is done at the next start"):
        if not worker.run(watch):  # in the middle of a long computation, which nothing can end but the process's end
            sys.stdout.flush()
            os._exit(0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vllm_serve(
    context: typer.Context,
    subspace: Annotated[
        Path | None, typer.Option(envvar=SUBSPACE_VARIABLE, help="Subspace file of the served model.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(envvar=POLICY_VARIABLE, help="Policy (TOML).")] = None,
    decisions: Annotated[
        Path | None, typer.Option(envvar=DECISIONS_VARIABLE, help="Append a JSON line per decision to this file.")
    ] = None,
) -> None:
    """Run `vllm serve` with all further arguments, or fail if adapters would not be corrected."""
    from csulora.hooks.vllm.launcher import serve

    chosen = {SUBSPACE_VARIABLE: subspace, POLICY_VARIABLE: policy, DECISIONS_VARIABLE: decisions}
    os.environ.update({name: str(path.resolve()) for name, path in chosen.items() if path is not None})
    serve(context.args)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.")],
    base_model: Annotated[
        Path, typer.Option(metavar="DIR|GGUF", help="The model that llama.cpp will run with the adapter.")
    ],
    outtype: Outtype = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write an adapter as a GGUF LoRA file for llama.cpp, uncorrected."""
    check_outputs([output, json], [adapter, base_model])
    loaded = csulora.load_adapter(adapter, base_model)
    csulora.save_adapter(loaded, output, "gguf", base_model=base_model, outtype=outtype and outtype.value)
    document = {"adapter_sha256": loaded.sha256, "modules": tables.adapter_rows(loaded)}
    summary = f"{output}: {len(loaded.modules)} modules, uncorrected"
    deliver(tables.adapter_table(loaded), summary, document, json, quiet)


@app.command()
def doctor(json: Json = None, quiet: Quiet = False) -> None:
    """Check this installation."""
    findings = doctor_module.examine()
    works = all(finding.ok is not False for finding in findings)
    document = {"findings": [asdict(finding) for finding in findings]}
    summary = "this installation works" if works else "this installation does not work"
    deliver(doctor_module.table(findings), summary, document, json, quiet)
    if not works:
        raise typer.Exit(EXIT_BAD_INPUT)


def main() -> None:
    """Run the command line; every error csulora raises becomes one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        app(prog_name="csulora")
    except RefusedError as error:
        _fail("refused", error, EXIT_REFUSED)
    except (CsuloraError, OSError) as error:
        _fail("error", error, EXIT_BAD_INPUT)


def _fail(kind: str, reason: object, code: int) -> NoReturn:
    print(f"csulora: {kind}: {printable(reason)}", file=sys.stderr)
    sys.exit(code)


def _load_frontier(frontier: Path | None, policy: Path | None) -> Frontier | None:
    if frontier is None and policy is not None and frontier_path(policy).exists():
        frontier = frontier_path(policy)
    return Frontier.load(frontier) if frontier else None
