"""`csulora adjust`: a policy for adapters to come, with the strength that one of them needs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import csulora
from csulora.cli import exit_codes
from csulora.cli.arguments import Adapters, BaseModel, Json, Quiet, SubspaceSha256, check_outputs, file_of
from csulora.cli.console import deliver, progress_bar
from csulora.cli.model_loading import ModelDevice, ModelDeviceMap, ModelLoadIn, loading_of
from csulora.cli.several import outputs
from csulora.errors import CsuloraError, RefusedError, printable
from csulora.io.files import make_directory
from csulora.views.tables import plain_table

if TYPE_CHECKING:
    from csulora.extraction.model_pair import Progress
    from csulora.tuning.adjust import Adjusted

LEAST = 0.9  # of either kind of prompts, by default


def adjust(
    model: Annotated[str, typer.Argument(help="The aligned model: a directory or a hub id.")],
    adapters: Adapters,
    subspace: Annotated[Path, typer.Option(help="Subspace file that the policy is for.")],
    policy: Annotated[str, typer.Option(metavar="FILE", help="Policy for adapters to come, as `csulora tune` writes.")],
    safety: Annotated[str, typer.Option(metavar="SOURCE", help="Safety prompts, to answer as the aligned model does.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Policy file (TOML) to write; of several adapters, their directory.")
    ],
    general: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="General prompts, which limit the strength.")
    ] = None,
    refusal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="What refusals say: what counts is whether prompts are refused; may be repeated."
        ),
    ] = None,
    least: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse an adapter that keeps less than this share of either kind.")
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
    """Write a policy that reinforces as much as an adapter needs, by what the corrected adapter says to safety prompts.

    Several adapters get a policy each, NAME.toml below the output. One that fails stops no other.
    A SOURCE is one of `evaluate`; prompts that the policy was fitted to will do.
    """
    from csulora.evaluation import sources
    from csulora.tuning.adjust import MOST_TRIALS, Adjuster
    from csulora.tuning.language_model import LanguageModel
    from csulora.tuning.probes import FEWEST, MOST

    if not all(map(str.strip, refusal or ())):
        raise typer.BadParameter("--refusal is empty: every reply would count as a refusal")
    named = outputs(adapters, output, json) if len(adapters) > 1 else {}
    targets = {adapter: path.with_name(f"{path.name}.toml") for adapter, path in named.items()} or {adapters[0]: output}
    inputs = [model, *adapters, subspace, file_of(policy), *sources.files_of([safety, general]), base_model]
    check_outputs([*targets.values(), json], inputs)
    given, opened = csulora.Policy.load(policy), csulora.Subspace.open(subspace, subspace_sha256)
    given.strengthened(1.0)  # says at once if the policy has no strength
    asked = sources.read(safety, FEWEST, MOST), sources.read(general, FEWEST, MOST) if general else ()
    loading = loading_of(device, device_map, load_in)
    if len(adapters) > 1:
        make_directory(output)
    found: dict[str, Adjusted | CsuloraError | OSError] = {}
    with progress_bar("adjusting", quiet) as progress:
        adjuster = Adjuster(LanguageModel.open(model, loading, tokens), *asked, refusals=refusal or ())
        for number, adapter in enumerate(adapters):
            tick = _counting(progress, Path(adapter).name, number * MOST_TRIALS, len(adapters) * MOST_TRIALS)
            try:
                found[adapter] = each = adjuster.adjust(
                    csulora.load_adapter(adapter, base_model), opened, given, least, tick
                )
                each.check(least, adapter)
                each.policy.save(targets[adapter])
            except (CsuloraError, OSError) as error:
                if len(adapters) == 1:
                    raise
                found[adapter] = error
    _tell(found, targets, json, quiet)


def _counting(progress: Progress | None, name: str, done: int, total: int) -> Callable[[], None]:
    """Return what tells of one more trial each time that it is called."""
    trials = itertools.count(done)
    return lambda: progress(name, next(trials), total) if progress else None


def _tell(
    found: Mapping[str, Adjusted | CsuloraError | OSError], targets: Mapping[str, Path], json: Path | None, quiet: bool
) -> None:
    """Say what became of every adapter.

    Raises:
        typer.Exit: one failed: with `exit_codes.REFUSED` if all that did were refused.
    """
    table = plain_table(
        "adapter", "strength", "safety prompts\nkept before", "safety prompts\nkept", "general", whole=True
    )
    entries: dict[str, dict[str, Any]] = {}
    for adapter, each in found.items():
        if isinstance(each, Exception):
            kind = "refused" if isinstance(each, RefusedError) else "error"
            entries[adapter] = {kind: printable(each)}
            print(f"csulora: {kind}: {printable(each)}", file=sys.stderr)
        else:
            kept = {"before": asdict(each.before), "kept": asdict(each.kept)}
            entries[adapter] = {"output": str(targets[adapter]), "strength": each.strength} | kept
            rates = each.before.safety, each.kept.safety, each.kept.general or "-"
            table.add_row(printable(Path(adapter).name), f"{each.strength:g}", *map(str, rates))
    written = "\n".join(f"wrote {targets[adapter]}" for adapter, entry in entries.items() if "output" in entry)
    deliver(table, written, {"adapters": entries}, json, quiet)
    failed = [each for each in found.values() if isinstance(each, Exception)]
    if failed:
        every_refused = all(isinstance(each, RefusedError) for each in failed)
        raise typer.Exit(exit_codes.REFUSED if every_refused else exit_codes.BAD_INPUT)
