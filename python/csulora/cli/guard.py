"""`csulora guard`: every adapter that appears in a directory is corrected or refused."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csulora.cli.arguments import (
    BaseModel,
    Json,
    PolicySource,
    Quiet,
    RequireRulesSignature,
    RequireSignature,
    SignWith,
    SubspaceSha256,
    check_apart,
    check_outputs,
    chosen_policy,
    file_of,
)
from csulora.cli.console import deliver
from csulora.cli.interruption import interruptible
from csulora.errors import InputError, RefusedError

if TYPE_CHECKING:
    from csulora.serving.gate import Gate


_Watch = Annotated[
    bool, typer.Option("--watch", help="Go on until SIGTERM or SIGINT; SIGHUP reads policy and subspace file again.")
]
_Plan = Annotated[bool, typer.Option("--plan", help="Say what would become of every upload, and write nothing.")]
_Jobs = Annotated[int, typer.Option(min=1, help="Uploads decided on at a time; each needs memory for its adapter.")]
_Withdraw = Annotated[
    bool,
    typer.Option("--withdraw", help="Withdraw adapters that left INCOMING, which must hold a file .csulora-incoming."),
]
_Quarantine = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Move refused uploads to this directory beside INCOMING.")
]
_FailOnRefusal = Annotated[
    bool, typer.Option("--fail-on-refusal", help="Exit 3 if an upload is not let through; not with --watch.")
]
_Together = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Names that the server adds up; any sum obeys max_undo; repeatable."),
]
_Metrics = Annotated[str | None, typer.Option(metavar="[HOST:]PORT", help="Serve metrics for Prometheus there.")]


def guard(
    incoming: Annotated[Path, typer.Argument(help="Directory that adapters are uploaded to.")],
    outgoing: Annotated[Path, typer.Argument(help="Directory for the corrected ones; point the server here.")],
    subspace: Annotated[Path, typer.Option(help="Subspace file of the served model.")],
    policy: PolicySource = None,
    base_model: BaseModel = None,
    watch: _Watch = False,
    plan: _Plan = False,
    jobs: _Jobs = 1,
    settle: Annotated[float, typer.Option(min=0, help="Seconds an upload must not change before it is read.")] = 2.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds until an unreadable upload is refused.")] = 60.0,
    withdraw: _Withdraw = False,
    quarantine: _Quarantine = None,
    fail_on_refusal: _FailOnRefusal = False,
    decisions: Annotated[Path | None, typer.Option(help="Append a JSON line per decision to this file.")] = None,
    health: Annotated[Path | None, typer.Option(help="Say in this file every second how the guard is.")] = None,
    metrics: _Metrics = None,
    subspace_sha256: SubspaceSha256 = None,
    require_signature: RequireSignature = None,
    require_rules_signature: RequireRulesSignature = None,
    sign_with: SignWith = None,
    together: _Together = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Correct or refuse every adapter that appears in a directory."""
    if watch and (fail_on_refusal or plan):
        raise typer.BadParameter("--watch goes on for ever; leave out --fail-on-refusal and --plan")
    if json and not plan:
        raise typer.BadParameter("--json goes with --plan; --decisions logs what the guard decides")
    reload = threading.Event()  # asked for; also while torch is imported, where nobody listens yet
    if watch:
        signal.signal(signal.SIGHUP, lambda *_: reload.set())
    chosen_policy(policy, require_rules_signature)
    keys = [sign_with, require_signature, require_rules_signature]
    check_outputs([json, health, decisions], [subspace, file_of(policy), base_model, *keys])
    for file in filter(None, (json, health, decisions)):
        check_apart(file, [incoming, outgoing])
    from csulora.serving import metrics as exposed
    from csulora.serving.gate import Gate
    from csulora.serving.guard import DirectoryGuard, Options

    def opened() -> Gate:
        return Gate.open(
            subspace,
            policy,
            None if plan else decisions,
            subspace_sha256,
            "guard",
            require_signature,
            require_rules_signature,
            sign_with,
        )

    if plan:
        names = _plan(incoming, outgoing, opened(), base_model, tuple(together or ()), json, quiet)
        if fail_on_refusal and names:
            raise RefusedError(f"{len(names)} uploads would not be let through: {_shown(names)}")
        return
    worker = DirectoryGuard(
        incoming,
        outgoing,
        opened(),
        Options(settle, patience, base_model, jobs, withdraw, quarantine, health, tuple(together or ())),
        say=lambda line: None if quiet else print(line, flush=True),
        reopen=opened,
        reload=reload,
    )
    if metrics is not None:
        exposed.serve(metrics)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    with interruptible("what was not finished is done at the next start"):
        is_done = worker.run(watch)
    if not quiet:
        print(worker.summary, flush=True)
    if not is_done:  # in the middle of a long computation, which nothing can end but the process's end
        sys.stdout.flush()
        os._exit(0)
    if fail_on_refusal and (names := worker.not_let_through):
        raise RefusedError(
            f"{len(names)} uploads are not let through: {_shown(names)}; {outgoing}/NAME.refused.json says why"
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _plan(
    incoming: Path,
    outgoing: Path,
    gate: Gate,
    base_model: str | None,
    together: tuple[str, ...],
    json: Path | None,
    quiet: bool,
) -> list[str]:
    """Deliver the plan, and return the names of uploads that would not be let through."""
    from csulora.serving.guard.plan import plan
    from csulora.views.plan_table import plan_table

    if not incoming.is_dir():
        raise InputError(f"{incoming}: no such directory; name the one that adapters are uploaded to")
    planned = list(plan(incoming, outgoing, gate, base_model, together))
    verdicts = Counter(row.verdict for row in planned)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "no uploads"
    summary = f"it would be: {counts}; {sum(row.is_changed for row in planned)} of {len(planned)} differ from now"
    document = {
        "subspace_sha256": gate.subspace.sha256,
        "policy_sha256": gate.source.sha256,
        "uploads": [asdict(row) | {"is_changed": row.is_changed} for row in planned],
    }
    deliver(plan_table(planned), summary, document, json, quiet)
    return [row.name for row in planned if row.verdict != "corrected"]
