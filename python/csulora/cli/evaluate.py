"""`csulora evaluate`: what policies are worth on prompts that they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import csulora
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
    file_of,
)
from csulora.cli.console import deliver, progress_bar
from csulora.cli.interruption import interruptible
from csulora.cli.model_loading import (
    ModelDevice,
    ModelDeviceMap,
    ModelLoadIn,
    check_aligned,
    loading_of,
    written_general,
)
from csulora.errors import InputError
from csulora.policy.policy import Policy
from csulora.policy.toml import POLICY_CHOICES, PRESETS

if TYPE_CHECKING:
    from csulora.subspace.subspace import Subspace

_UNTRIED = ("csulora", "project", "protect")  # presets that are evaluated where no policy is named


def evaluate(
    model: Annotated[str, typer.Argument(help="The aligned model: a directory or a hub id.")],
    adapters: Adapters,
    subspace: Annotated[Path, typer.Option(help="Subspace file of the model.")],
    task: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE", help="Task prompts, to answer as the raw adapter does: for all adapters, or one for each."
        ),
    ],
    safety: Annotated[str, typer.Option(metavar="SOURCE", help="Safety prompts, to answer as the aligned model does.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Evaluation (JSON) to write, with every reply.")],
    general: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="General prompts, to be answered as before.")
    ] = None,
    write_general: WriteGeneral = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help=f"A preset ({', '.join(PRESETS)}) or a policy file; repeatable. [default: {', '.join(_UNTRIED)}]",
        ),
    ] = None,
    refusal: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What refusals say, to count them; repeatable.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server of a guard model, up to /v1, that says which replies to safety prompts are safe.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its model. [default: the first that it lists]")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-eval, or YAML files of tasks, separated by commas."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Most tokens of a reply.")] = 32,
    keep_uncovered: KeepUncovered = None,
    drop_uncovered: DropUncovered = None,
    device: ModelDevice = None,
    device_map: ModelDeviceMap = None,
    load_in: ModelLoadIn = None,
    base_model: BaseModel = None,
    subspace_sha256: SubspaceSha256 = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure policies on prompts that they have not seen, beside the raw adapter and plain scaling; it fits nothing.

    A SOURCE is a file with a prompt per line or with chats as JSON lines, or a column of a table. A column is
    FILE.csv#COLUMN, FILE.parquet#COLUMN, or hf:ORG/NAME/SPLIT#COLUMN, a data set of the hub.
    """
    from csulora.evaluation.judge import Judge
    from csulora.evaluation.request import Options
    from csulora.evaluation.sources import files_of
    from csulora.views.evaluation_table import evaluation_table

    if general and write_general:
        raise typer.BadParameter("--general and --write-general exclude each other; give one of them")
    files = files_of([*task, safety, general])
    files += filter(None, map(file_of, policy or ()))
    check_outputs([output, write_general, json], [model, *adapters, subspace, *files, base_model])
    if len(task) not in (1, len(adapters)):
        raise typer.BadParameter(f"{len(adapters)} adapters need one --task for all or one for each, not {len(task)}")
    check_refusals(refusal)
    if judge_model and not judge:
        raise typer.BadParameter("--judge-model is for --judge")
    loading = loading_of(device, device_map, load_in)
    opened = csulora.Subspace.open(subspace, subspace_sha256)
    check_aligned(model, opened, quiet=quiet)
    policies = _policies(policy or _UNTRIED, keep_uncovered, drop_uncovered)
    subspaces = _own_subspaces(policies, opened)
    if write_general:
        seen = {prompt for _, each in policies.values() for prompt in each.provenance.prompts}
        general = written_general(write_general, model, loading, 1, refusal, seen, quiet=quiet)
    options = Options(
        refusals=tuple(refusal or ()),
        longest_reply=tokens,
        loading=loading,
        judge=Judge.at(judge, judge_model) if judge else None,
        lm_eval=tuple(task.strip() for task in lm_eval.split(",")) if lm_eval else (),
    )
    loaded = [csulora.load_adapter(adapter, base_model) for adapter in adapters]
    with (
        interruptible("finished batches are kept; run the same command to continue"),
        progress_bar("evaluating", quiet, lines=True) as progress,
    ):
        evaluation = csulora.evaluate(
            model,
            loaded,
            {name: each for name, (_, each) in policies.items()},
            opened,
            task=task,
            safety=safety,
            general=general or (),
            subspaces=subspaces,
            options=options,
            output=output,
            progress=progress,
        )
    deliver(evaluation_table(evaluation), f"wrote {output}, with every reply", evaluation.to_dict(), json, quiet)


def _policies(
    sources: Sequence[str], keep_uncovered: list[str] | None, drop_uncovered: list[str] | None
) -> dict[str, tuple[str, Policy]]:
    """Return name in the table -> where it comes from, and the policy."""
    given = {"keep_uncovered": keep_uncovered, "drop_uncovered": drop_uncovered}
    changes: dict[str, Any] = {name: tuple(globs) for name, globs in given.items() if globs}
    found: dict[str, tuple[str, Policy]] = {}
    for source in sources:
        name = source if source in PRESETS else Path(source).stem
        if name in found:
            raise typer.BadParameter(f"two policies are called {name}; rename a file; {POLICY_CHOICES}")
        found[name] = source, replace(Policy.load(source), **changes)
    return found


def _own_subspaces(policies: dict[str, tuple[str, Policy]], opened: Subspace) -> dict[str, Subspace]:
    """Return the subspace files that lie beside tuned policies, where those were tuned for them and not for the one."""
    from csulora.tuning.tune import subspace_path

    found = {}
    for name, (source, policy) in policies.items():
        if policy.subspace_sha256 in (None, opened.sha256):
            continue
        beside = subspace_path(Path(source))
        if not beside.exists():
            raise InputError(f"{source}: was tuned for another subspace file; put that one beside it as {beside.name}")
        found[name] = csulora.Subspace.open(beside, policy.subspace_sha256)
    return found
