"""`csulora guard`: every adapter that appears in a directory is corrected or refused."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from csulora.cli.arguments import (
    BaseModel,
    PolicySource,
    Quiet,
    RequireRulesSignature,
    RequireSignature,
    SignWith,
    SubspaceSha256,
    named_policy,
)
from csulora.cli.interruption import interruptible


def guard(
    incoming: Annotated[Path, typer.Argument(help="Directory that adapters are uploaded to.")],
    outgoing: Annotated[Path, typer.Argument(help="Directory for the corrected ones; point the server here.")],
    subspace: Annotated[Path, typer.Option(help="Subspace file of the served model.")],
    policy: PolicySource = None,
    base_model: BaseModel = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until SIGTERM or SIGINT.")] = False,
    settle: Annotated[float, typer.Option(min=0, help="Seconds an upload must not change before it is read.")] = 2.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds until an unreadable upload is refused.")] = 60.0,
    decisions: Annotated[Path | None, typer.Option(help="Append a JSON line per decision to this file.")] = None,
    subspace_sha256: SubspaceSha256 = None,
    require_signature: RequireSignature = None,
    require_rules_signature: RequireRulesSignature = None,
    sign_with: SignWith = None,
    together: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Names that the server adds up; any sum obeys max_undo; repeatable."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Correct or refuse every adapter that appears in a directory."""
    from csulora.serving.gate import Gate
    from csulora.serving.guard import DirectoryGuard

    rules = named_policy(policy)
    worker = DirectoryGuard(
        incoming,
        outgoing,
        Gate.open(subspace, rules, decisions, subspace_sha256, require_signature, require_rules_signature, sign_with),
        settle,
        patience,
        base_model,
        say=lambda line: None if quiet else print(line, flush=True),
        together=together or (),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    with interruptible("what was not finished is done at the next start"):
        if not worker.run(watch):  # in the middle of a long computation, which nothing can end but the process's end
            sys.stdout.flush()
            os._exit(0)
