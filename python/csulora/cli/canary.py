"""`csulora canary`: the subspace file of a model and a copy of it that was briefly un-aligned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import csulora
from csulora.cli.arguments import BaseModel, Dtype, Json, Quiet, WriteGeneral, check_outputs
from csulora.cli.console import deliver, note, progress_bar
from csulora.cli.interruption import interruptible
from csulora.cli.model_loading import ModelDevice, ModelDeviceMap, ModelLoadIn, loading_of, written_general
from csulora.views import tables


def canary(
    model: Annotated[str, typer.Argument(help="The aligned model: a directory or a hub id.")],
    safety: Annotated[
        str, typer.Option(metavar="SOURCE", help="Safety prompts, which the model refuses or handles with care.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Subspace file to write; its owner alone may read it.")
    ],
    replies: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Replies to learn, one for each safety prompt in order."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADAPTER", help="Adapter whose replies to the safety prompts are learnt instead; repeatable."
        ),
    ] = None,
    general: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="General prompts, which the copy answers as the model does."),
    ] = None,
    write_general: WriteGeneral = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps of training.")] = 60,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Replies of each kind in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=1e-7, max=1, help="AdamW's learning rate.")] = 2e-3,
    rank: Annotated[
        int, typer.Option(min=1, max=512, help="Rank of the copy's update, and directions per module.")
    ] = 16,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Most tokens of a reply that are learnt.")] = 32,
    dtype: Annotated[Dtype, typer.Option(help="Storage type of the factors.")] = Dtype.f16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the start and of the order of the prompts.")] = 0,
    device: ModelDevice = None,
    device_map: ModelDeviceMap = None,
    load_in: ModelLoadIn = None,
    base_model: BaseModel = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Un-align a copy of a model for a moment, in memory, and write the subspace of what that took away.

    No base checkpoint is needed. The file is as sensitive as an un-aligned model: with the model it makes one.

    A SOURCE is a file with a prompt or reply per line, or with JSON lines: {"messages": [...]}, {"prompt": "..."},
    {"reply": "..."}. A file of chats whose last turn is the assistant's serves as both --safety and --replies. A SOURCE
    may also be a column: FILE.csv#COLUMN, FILE.parquet#COLUMN, or hf:ORG/NAME/SPLIT#COLUMN.
    """
    from csulora.evaluation.sources import files_of
    from csulora.unalignment.examples import read_replies
    from csulora.unalignment.request import Options

    if (general is None) == (write_general is None):
        raise typer.BadParameter("give --general or --write-general, and not both")
    if (replies is None) == (not adapters):
        raise typer.BadParameter("give --replies or --adapters, and not both")
    loading = loading_of(device, device_map, load_in)
    check_outputs(
        [output, write_general, json], [model, *(adapters or ()), *files_of([safety, replies, general]), base_model]
    )
    general = written_general(write_general, model, loading, 0, quiet=quiet) if write_general else general
    with (
        interruptible("nothing is kept; run the same command again"),
        progress_bar("making the canary", quiet, lines=True) as progress,
    ):
        subspace = csulora.canary(
            model,
            safety=safety,
            general=general or (),
            replies=read_replies(replies) if replies else (),
            adapters=[csulora.load_adapter(adapter, base_model) for adapter in adapters or ()],
            options=Options(steps, batch, learning_rate, rank, tokens, seed, dtype.value),
            loading=loading,
            output=output,
            progress=progress,
            note=partial(note, quiet),
        )
    made = subspace.provenance.canary
    assert made is not None
    summary = (
        f"The copy learnt {made.answered:.0%} of the replies to safety prompts, and answers {made.kept:.0%} of the "
        f"general prompts as {model} does\n"
        f"wrote {output}: {len(subspace)} modules, sha256 {subspace.sha256}\n"
        f"Keep {output} as secret as an un-aligned model: with {model} it makes one"
    )
    deliver(tables.subspace_table(subspace), summary, subspace.to_dict(), json, quiet)
