"""`csulora adjust`: a policy for adapters to come, with the strength that each of some adapters needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import csulora
from csulora.cli.arguments import (
    Adapters,
    BaseModel,
    Json,
    Quiet,
    SubspaceSha256,
    check_outputs,
    check_refusals,
    chosen_policy,
    file_of,
)
from csulora.cli.console import deliver, progress_bar
from csulora.cli.interruption import interruptible
from csulora.cli.model_loading import ModelDevice, ModelDeviceMap, ModelLoadIn, check_aligned, loading_of
from csulora.cli.several import tell_failure
from csulora.errors import CsuloraError, InputError, printable
from csulora.io.files import check_file
from csulora.views.tables import plain_table

if TYPE_CHECKING:
    from csulora.extraction.model_pair import Progress
    from csulora.tuning.adjust import Adjusted

LEAST = 0.9  # of each kind of prompts, by default


def adjust(
    model: Annotated[str, typer.Argument(help="The aligned model: a directory or a hub id.")],
    adapters: Adapters,
    subspace: Annotated[Path, typer.Option(help="Subspace file that the policy is for.")],
    policy: Annotated[str, typer.Option(metavar="FILE", help="Policy for adapters to come, as `csulora tune` writes.")],
    safety: Annotated[str, typer.Option(metavar="SOURCE", help="Safety prompts, to answer as the aligned model does.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Policy file (TOML) to write, with the strengths.")],
    general: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="General prompts, which limit the strength.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Task prompts, to answer as the uncorrected adapter does: for all adapters, or one for each.",
        ),
    ] = None,
    refusal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="What refusals say: what counts is whether prompts are refused; may be repeated."
        ),
    ] = None,
    least: Annotated[
        float,
        typer.Option(min=0, max=1, help="Refuse an adapter that keeps less than this share of a kind of prompts."),
    ] = LEAST,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Most tokens of a reply.")] = 32,
    device: ModelDevice = None,
    device_map: ModelDeviceMap = None,
    load_in: ModelLoadIn = None,
    base_model: BaseModel = None,
    subspace_sha256: SubspaceSha256 = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write a policy that reinforces as much as each adapter needs, by what it says to safety prompts when corrected.

    The policy refuses all adapters but these, and those that it had strengths for. One that fails stops no other.
    A SOURCE is one of `evaluate`; prompts that the policy was fitted to will do.
    """
    from csulora.correction.correct import check_subspace
    from csulora.evaluation import sources
    from csulora.tuning.adjust import MOST_TRIALS, Adjuster
    from csulora.tuning.language_model import LanguageModel
    from csulora.tuning.probes import FEWEST, MOST, check_apart

    check_refusals(refusal)
    tasks = task or []
    if len(tasks) not in (0, 1, len(adapters)):
        raise typer.BadParameter(f"{len(adapters)} adapters take one --task for all or one for each, not {len(tasks)}")
    inputs = [model, *adapters, subspace, file_of(policy), *sources.files_of([safety, general, *tasks]), base_model]
    check_outputs([output, json], inputs)
    check_file(output)
    given, opened = chosen_policy(policy), csulora.Subspace.open(subspace, subspace_sha256)
    given.check_reinforcing()
    check_subspace(given, opened)
    check_aligned(model, opened, quiet=quiet)
    asked = sources.read(safety, FEWEST, MOST), sources.read(general, FEWEST, MOST) if general else ()
    chats = [sources.read(each, FEWEST, MOST) for each in tasks] or [()]
    check_apart(asked[0], "general", asked[1])
    for of_task in chats:
        check_apart(asked[0], "task", of_task)
    loading = loading_of(device, device_map, load_in)
    if len(adapters) == 1:
        csulora.load_adapter(adapters[0], base_model)  # says what is wrong with it before the model is loaded
    found: dict[str, Adjusted] = {}
    failed: dict[str, dict[str, Any]] = {}
    codes: set[int] = set()
    contents: set[str] = set()
    reason = f"{output} has the strengths that were found, if it is there; run the same command to find all"
    with interruptible(reason), progress_bar("adjusting", quiet, lines=True) as progress:
        adjuster = Adjuster(LanguageModel.open(model, loading, tokens), *asked, refusals=refusal or ())
        for number, adapter in enumerate(adapters):
            tick = _counting(progress, Path(adapter).name, number * MOST_TRIALS, len(adapters) * MOST_TRIALS)
            tick()
            try:
                loaded = csulora.load_adapter(adapter, base_model)
                if loaded.sha256 in contents:
                    raise InputError(f"{adapter}: is given twice; an adapter has one strength, so give it once")
                contents.add(loaded.sha256)
                given = given.with_strength(loaded.sha256, None)  # it gets none if it fails
                each = adjuster.adjust(loaded, opened, given, least, chats[number % len(chats)], tick)
                each.check(least, adapter)
                given, found[adapter] = each.policy, each
            except (CsuloraError, OSError) as error:
                if len(adapters) == 1:
                    raise
                failed[adapter], code = tell_failure(adapter, error)
                codes.add(code)
            if found:
                given.save(output)
    summary = f"wrote {output}; it refuses adapters that it has no strength for"
    _deliver(adapters, found, failed, summary, json, quiet)
    if codes:
        raise typer.Exit(max(codes))


def _counting(progress: Progress | None, name: str, done: int, total: int) -> Callable[[], None]:
    """Return what tells first that an adapter begins, then of one more trial each time that it is called."""
    trials = itertools.count(done)
    return lambda: progress(name, next(trials), total) if progress else None


def _deliver(
    adapters: Sequence[str],
    found: Mapping[str, Adjusted],
    failed: Mapping[str, dict[str, Any]],
    summary: str,
    json: Path | None,
    quiet: bool,
) -> None:
    """Print what was found, if anything was, and write the document about every adapter."""
    table = plain_table(
        "adapter", "strength", "safety kept\nat strength 1", "safety\nkept", "general\nkept", "task\nkept", whole=True
    )
    entries = dict(failed)
    for adapter, each in found.items():
        kept = {"before": asdict(each.before), "kept": asdict(each.kept)}
        entries[adapter] = {"strength": each.strength} | kept
        rates = each.before.safety, each.kept.safety, each.kept.general or "-", each.kept.task or "-"
        table.add_row(printable(Path(adapter).name), f"{each.strength:g}", *map(str, rates))
    document = {"adapters": {adapter: entries[adapter] for adapter in adapters}}
    deliver(table, summary, document, json, quiet or not found)
