"""`csulora export`: an adapter as a GGUF LoRA file, as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import csulora
from csulora.cli.arguments import AdapterSource, ExpertOrder, Json, Outtype, Quiet, check_outputs
from csulora.cli.console import deliver
from csulora.views import tables


def export(
    adapter: AdapterSource,
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.")],
    base_model: Annotated[
        Path, typer.Option(metavar="DIR|GGUF", help="The model that llama.cpp will run with the adapter.")
    ],
    expert_layout: ExpertOrder = None,
    outtype: Outtype = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write an adapter as a GGUF LoRA file for llama.cpp, as it is."""
    check_outputs([output, json], [adapter, base_model])
    loaded = csulora.load_adapter(adapter, base_model, expert_layout=expert_layout)
    csulora.save_adapter(loaded, output, "gguf", base_model=base_model, outtype=outtype and outtype.value)
    document = {"adapter_sha256": loaded.sha256, "modules": tables.adapter_rows(loaded)}
    summary = f"wrote {output}: {len(loaded.modules)} modules, as they are in {adapter}"
    deliver(tables.adapter_table(loaded), summary, document, json, quiet)
