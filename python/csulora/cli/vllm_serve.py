"""`csulora vllm-serve`: vLLM's server, guarded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from csulora.policy.policy import PRESETS
from csulora.serving.variables import DECISIONS_VARIABLE, POLICY_VARIABLE, SUBSPACE_VARIABLE


def vllm_serve(
    context: typer.Context,
    subspace: Annotated[
        Path | None, typer.Option(envvar=SUBSPACE_VARIABLE, help="Subspace file of the served model.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            envvar=POLICY_VARIABLE, metavar="NAME|FILE", help="A preset, or a policy file (TOML); there is no default."
        ),
    ] = None,
    decisions: Annotated[
        Path | None, typer.Option(envvar=DECISIONS_VARIABLE, help="Append a JSON line per decision to this file.")
    ] = None,
) -> None:
    """Run `vllm serve` with all further arguments, or fail if adapters would not be corrected."""
    from csulora.hooks.vllm.launcher import serve

    files = {SUBSPACE_VARIABLE: subspace, DECISIONS_VARIABLE: decisions}
    if policy in PRESETS:
        os.environ[POLICY_VARIABLE] = policy
    elif policy is not None:
        files[POLICY_VARIABLE] = Path(policy)
    os.environ.update({name: str(path.resolve()) for name, path in files.items() if path is not None})
    serve(context.args)
