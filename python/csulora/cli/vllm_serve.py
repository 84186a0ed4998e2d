"""`csulora vllm-serve`: vLLM's server, guarded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from csulora.serving.variables import DECISIONS_VARIABLE, POLICY_VARIABLE, SUBSPACE_VARIABLE


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
