"""`csulora tune`: a policy fitted to prompts."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import csulora
from csulora.cli import exit_codes
from csulora.cli.arguments import (
    Adapters,
    BaseModel,
    DropUncovered,
    Json,
    KeepUncovered,
    Quiet,
    SubspaceSha256,
    WriteGeneral,
    check_outputs,
    check_refusals,
)
from csulora.cli.console import deliver, note, progress_bar
from csulora.cli.interruption import interruptible
from csulora.cli.model_loading import (
    ModelDevice,
    ModelDeviceMap,
    ModelLoadIn,
    check_aligned,
    loading_of,
    written_general,
)
from csulora.tuning.frontier import Frontier, frontier_path
from csulora.tuning.options import Options
from csulora.views import tables

QUICK_STEPS = 30


def tune(
    model: Annotated[str, typer.Argument(help="The aligned model: a directory or a hub id.")],
    adapters: Adapters,
    subspace: Annotated[Path, typer.Option(help="Subspace file of the model.")],
    task: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Task prompts, to answer as the adapter does, not of its task alone; one per adapter, in order.",
        ),
    ],
    safety: Annotated[str, typer.Option(metavar="SOURCE", help="Safety prompts, to answer as the aligned model does.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Policy file (TOML) to write.")],
    general: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="General prompts, to be answered as before.")
    ] = None,
    write_general: WriteGeneral = None,
    for_others: Annotated[
        bool, typer.Option("--for-others", help="Fit one adapter's policy, too, for adapters to come.")
    ] = False,
    input_filters: Annotated[
        bool, typer.Option(help="Try input filters for safety prompts, too, for adapters to come.")
    ] = True,
    limit_undo: Annotated[
        bool,
        typer.Option("--limit-undo", help="Refuse adapters to come that undo more of the alignment than each given."),
    ] = False,
    keep_uncovered: KeepUncovered = None,
    drop_uncovered: DropUncovered = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"A first look: {QUICK_STEPS} steps and the first weight, if not said.")
    ] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Fit the controls and measure all presets, too, to compare.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Steps of a fit, for each adapter. [default: {Options.steps}]")
    ] = None,
    task_weight: Annotated[
        list[float] | None,
        typer.Option(
            min=0.1, max=1000, help="Weights of the task prompts to try. [default: 8, 2, 30; for adapters to come 1]"
        ),
    ] = None,
    refusal: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What refusals say, to count them and choose by them; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Most tokens of a reply that count.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the prompts.")] = 0,
    device: ModelDevice = None,
    device_map: ModelDeviceMap = None,
    load_in: ModelLoadIn = None,
    base_model: BaseModel = None,
    subspace_sha256: SubspaceSha256 = None,
    require_verdict: Annotated[
        bool,
        typer.Option(
            "--require-verdict",
            help=f"Write no policy that does not beat plain scaling, and end with exit code {exit_codes.NO_VERDICT}.",
        ),
    ] = False,
    every_policy: Annotated[
        bool, typer.Option("--all", help="Show all policies that were measured, not the best five.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Fit a policy to prompts, and write the subspace file to use it with; several adapters get one policy for all.

    A SOURCE is a file with a prompt per line or with chats as JSON lines, or a column of a table, see `evaluate`.
    `tune` needs no reference replies.
    """
    from csulora.evaluation import sources
    from csulora.tuning.probes import FEWEST, MOST
    from csulora.tuning.recommendation import TUNED
    from csulora.tuning.request import Request
    from csulora.tuning.tune import subspace_path, tune

    if general and write_general:
        raise typer.BadParameter("--general and --write-general exclude each other; give one of them")
    files = sources.files_of([*task, safety, general])
    inputs = [model, *adapters, subspace, *files, base_model]
    check_outputs([output, frontier_path(output), subspace_path(output), write_general, json], inputs)
    if len(task) != len(adapters):
        raise typer.BadParameter(f"{len(adapters)} adapters need as many --task files, in their order, not {len(task)}")
    check_refusals(refusal)
    loading = loading_of(device, device_map, load_in)
    opened = csulora.Subspace.open(subspace, subspace_sha256)
    check_aligned(model, opened, quiet=quiet)
    general = written_general(write_general, model, loading, 0, refusal, quiet=quiet) if write_general else general
    request = Request(
        model=model,
        adapters=[csulora.load_adapter(adapter, base_model) for adapter in adapters],
        subspace=opened,
        task=[sources.read(source, FEWEST, MOST) for source in task],
        safety=sources.read(safety, FEWEST, MOST),
        general=sources.read(general, FEWEST, MOST) if general else (),
        for_others=for_others,
        input_filters=input_filters,
        limit_undo=limit_undo,
        keep_uncovered=tuple(keep_uncovered or ()),
        drop_uncovered=tuple(drop_uncovered or ()),
        loading=loading,
        longest_reply=tokens,
        options=Options(steps=steps or (QUICK_STEPS if quick else Options.steps), seed=seed),
        task_weights=task_weight or (),
        refusals=refusal or (),
        controls=controls,
    )
    if quick:
        request = replace(request, task_weights=request.weights[:1])
    reason = "finished stages are kept; run the same command to continue"
    with interruptible(reason), progress_bar("tuning", quiet, lines=True) as progress:
        frontier = tune(request, output, progress, partial(note, quiet), require_verdict)
    summary = [_splits(frontier), frontier.verdict]
    if frontier.recommended is None:
        summary.append(_advice(frontier))
    if frontier.recommended or not require_verdict:
        summary.append(f"{output}: {frontier.written}{_effect(frontier.written, limit_undo)}")
        used = subspace if frontier.subspace_sha256 == request.subspace.sha256 else subspace_path(output)
        summary.append(f"{used}: the subspace file to use it with")
        if request.is_for_others and frontier.written.startswith(TUNED):
            summary.append("csulora adjust finds how much of it each of the adapters to come needs")
    deliver(tables.frontier_table(frontier, every_policy), "\n".join(summary), frontier.to_dict(), json, quiet)
    if require_verdict and frontier.recommended is None:
        print(f"csulora: no policy beats plain scaling; {output} is not written", file=sys.stderr)
        raise typer.Exit(exit_codes.NO_VERDICT)


def _effect(written: str, limit_undo: bool) -> str:
    """Say what a policy of that name does not do, and what it does all the same."""
    if written != "none":
        return ""
    return ", which corrects nothing and refuses what is beyond the limit" if limit_undo else ", which corrects nothing"


def _advice(frontier: Frontier) -> str:
    """What to do if no policy beats plain scaling."""
    raw = next(point for point in frontier.points if point.family == "none")
    if raw.choice.value == 1:
        return (
            "The uncorrected adapter keeps everything on the validation split; unless other safety prompts show harm, "
            "it needs no correction"
        )
    return "Give more prompts or other weights; if that shows nothing either, do not load the adapter"


def _splits(frontier: Frontier) -> str:
    """Say how many prompts of each kind did what."""
    counts = {
        split: ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n) for split, kinds in frontier.prompts.items()
    }
    return (
        f"Fitted to {counts['training']} prompts; chosen on {counts['validation']}, then fitted to them as well; "
        f"reported on {counts['test']}, which chose nothing"
    )
