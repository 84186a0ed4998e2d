"""`csulora verify`: does a subspace file, or a corrected adapter, follow from what it was made from?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import csulora
from csulora.cli.arguments import BaseModel, ExpertOrder, Json, Quiet, check_outputs, file_of
from csulora.cli.console import deliver, progress_bar
from csulora.errors import InputError, RefusedError
from csulora.io.files import is_gguf_name
from csulora.policy.policy import Policy
from csulora.views import tables
from csulora.views.audit_table import audit_table
from csulora.views.provenance_table import provenance_table

if TYPE_CHECKING:
    from csulora.correction.audit import Check


def verify(
    subject: Annotated[
        Path,
        typer.Argument(
            metavar="SUBSPACE|ADAPTER|LOG", help="Subspace file, corrected adapter directory, or decision log."
        ),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCES...",
            help="What it was made from. Of a subspace file: the checkpoints before and after alignment. Of an "
            "adapter: the original adapter and the subspace file; without them only the adapter's content is compared "
            "with its report.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Policy that an adapter must have been corrected with. [default: what it states]",
        ),
    ] = None,
    decision: Annotated[
        str | None,
        typer.Option(
            metavar="ID|last",
            help="Make a decision of the log again. SOURCES, where they have moved: original, subspace file.",
        ),
    ] = None,
    expert_layout: ExpertOrder = None,
    base_model: BaseModel = None,
    require_signature: Annotated[
        str | None, typer.Option(metavar="PEM|IDENTITY", help="Who must have signed an adapter that csulora wrote.")
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Recompute a subspace file's certificates, a corrected adapter from its original, or a decision from its line.

    With --require-signature, verify the signature of what csulora wrote, and the statement of what it was made of.
    """
    if decision is not None:
        if (expert_layout, base_model, require_signature) != (None, None, None):
            raise typer.BadParameter("--decision takes all of that from the line; give only where files have moved")
        check_outputs([json], [subject, *(sources or ()), file_of(policy)])
        _verify_decision(subject, decision, sources or [], policy, json, quiet)
        return
    if policy is not None and len(sources or ()) != 2:
        raise typer.BadParameter("--policy goes with ADAPTER ORIGINAL SUBSPACE")
    check_outputs([json], [subject, *(sources or ()), file_of(policy), base_model, require_signature])
    if require_signature is not None:
        if sources:
            raise typer.BadParameter("--require-signature goes with ADAPTER alone; verify the sources without it")
        _verify_signature(subject, require_signature, json, quiet)
    elif is_gguf_name(subject):
        raise InputError(
            f"{subject}: a GGUF file has no report to verify; verify the PEFT directory that holds the same correction"
        )
    elif subject.is_dir() and len(sources or ()) in (0, 2):
        original, subspace = sources or (None, None)
        known = csulora.Subspace.open(subspace) if subspace else None
        required = Policy.load(policy) if policy else None
        checks = csulora.audit(subject, original, known, base_model, required, expert_layout=expert_layout)
        _deliver_audit(subject, checks, json, quiet, is_complete=subspace is not None)
    elif not subject.is_dir() and sources and len(sources) == 2:
        _verify_subspace(subject, sources[0], sources[1], json, quiet)
    else:
        raise typer.BadParameter("give SUBSPACE BASE ALIGNED, or ADAPTER ORIGINAL SUBSPACE, or ADAPTER alone")


def _verify_signature(path: Path, signer: str, json: Path | None, quiet: bool) -> None:
    from csulora.serving.provenance import verified_provenance
    from csulora.serving.signatures import Verifier

    verifier = Verifier.open(signer)
    provenance = verified_provenance(path, verifier)
    summary = f"{path}: signed by {verifier.trust.name}, written by csulora {provenance.version}"
    deliver(provenance_table(provenance), summary, {"provenance": asdict(provenance)}, json, quiet)


_ADVICE = {
    "input": "; name the original of then after LOG",
    "subspace": "; name the file of then after LOG and the original",
    "policy": "; name the file of then with --policy",
}
"""What to do if a file has moved or was replaced since the decision, by the first word of a check."""


def _verify_decision(
    log: Path, identity: str, sources: list[str], policy: str | None, json: Path | None, quiet: bool
) -> None:
    from csulora.hooks.sglang.placement import fitted
    from csulora.serving.again import Sources, decide_again, find

    if len(sources) > 2:
        raise typer.BadParameter("--decision goes with LOG, or LOG ORIGINAL, or LOG ORIGINAL SUBSPACE")
    line, replaced = find(log, identity)
    adapter, subspace = [*map(Path, sources), None, None][:2]
    moved = Sources(adapter, subspace, Path(policy) if policy else None)
    checks = decide_again(line, moved, fitted if line["route"] == "sglang" else None, replaced)
    failed = [check for check in checks if not check.holds]
    verdict = "does not hold" if failed else "was made again, bit by bit" if line["outputs"] else "holds"
    summary = f"decision {line['id']}, {line['verdict']}: {verdict}"
    deliver(audit_table(checks), summary, {"checks": [asdict(check) for check in checks]}, json, quiet)
    if failed:
        raise RefusedError(f"decision {line['id']}: {failed[0].reason}{_ADVICE.get(failed[0].what.split()[0], '')}")


def _deliver_audit(adapter: Path, checks: list[Check], json: Path | None, quiet: bool, *, is_complete: bool) -> None:
    failed = [check for check in checks if not check.holds]
    whole = (
        "follows from its original"
        if is_complete
        else "is as it was written; name original and subspace file to make it again"
    )
    summary = f"{adapter}: {'does not hold' if failed else whole}"
    deliver(audit_table(checks), summary, {"checks": [asdict(check) for check in checks]}, json, quiet)
    if failed:
        raise RefusedError(f"{adapter}: {failed[0].reason}")


def _verify_subspace(path: Path, base: str, aligned: str, json: Path | None, quiet: bool) -> None:
    subspace = csulora.Subspace.open(path)
    with progress_bar("verifying", quiet) as progress:
        results = csulora.verify(subspace, base, aligned, progress)
    failed = [result for result in results if not result.holds]
    summary = f"{path}: {len(results) - len(failed)} of {len(results)} certificates hold"
    document = {"modules": [asdict(result) | {"holds": result.holds} for result in results]}
    deliver(tables.verification_table(failed or results), summary, document, json, quiet)
    if failed:
        other = "is for other weights: name the checkpoints that the file was made from, the base first"
        stored = (
            "sketch is not the aligned matrix's" if not failed[0].same_sketch else "is better than what was measured"
        )
        reason = f"{stored}: extract again" if failed[0].same_weights else other
        raise RefusedError(
            f"{path}: {len(failed)} of {len(results)} certificates do not hold; that of {failed[0].module} {reason}"
        )
