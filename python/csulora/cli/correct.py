"""`csulora correct`: the corrected adapter, or the reason for refusing it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import csulora
from csulora.cli.arguments import (
    Adapters,
    AlignedModel,
    BaseModel,
    DropUncovered,
    EveryModule,
    ExpertLayout,
    ExpertOrder,
    Format,
    Json,
    KeepUncovered,
    MaxTotalUndo,
    MaxUndo,
    MinAnnihilationRatio,
    Outtype,
    PolicySource,
    Quiet,
    RequireRulesSignature,
    RequireSignature,
    SignWith,
    SubspaceSha256,
    check_outputs,
    chosen_policy,
    file_of,
    is_gguf_written,
    parse_rank,
)
from csulora.cli.console import deliver
from csulora.cli.several import correct_several, outputs
from csulora.errors import InputError

if TYPE_CHECKING:
    from csulora.adapters.expert_encoding import Layout
    from csulora.correction.report import Report


def correct(
    adapters: Adapters,
    subspace: Annotated[Path, typer.Option(help="Subspace file of the model the adapter is for.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory to write, or GGUF file; of several adapters, their parent."),
    ],
    policy: PolicySource = None,
    aligned: Annotated[float | None, typer.Option(help="Penalty on the aligned component; inf removes it.")] = None,
    partial: Annotated[float | None, typer.Option(help="Penalty on the partial component.")] = None,
    off: Annotated[float | None, typer.Option(help="Penalty on the off component.")] = None,
    rank: Annotated[str | None, typer.Option(help="keep, exact or a number. [default: keep]")] = None,
    keep_uncovered: KeepUncovered = None,
    drop_uncovered: DropUncovered = None,
    max_undo: MaxUndo = None,
    max_total_undo: MaxTotalUndo = None,
    min_annihilation_ratio: MinAnnihilationRatio = None,
    aligned_model: AlignedModel = None,
    format: Annotated[
        Format | None,
        typer.Option(help="Format to write. [default: gguf for *.gguf, else the adapter's]"),
    ] = None,
    layout: Annotated[
        ExpertLayout | None, typer.Option(help="Layout of experts to write. [default: the adapter's]")
    ] = None,
    expert_layout: ExpertOrder = None,
    base_model: BaseModel = None,
    outtype: Outtype = None,
    subspace_sha256: SubspaceSha256 = None,
    require_signature: RequireSignature = None,
    require_rules_signature: RequireRulesSignature = None,
    sign_with: SignWith = None,
    every_module: EveryModule = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write the corrected adapter, or refuse it with the reason.

    Several adapters are corrected side by side, each into a directory of its own name below the output.
    A line says what became of each, and one that fails stops no other.
    Further options replace what the policy says, but for its overrides.
    """
    targets = outputs(adapters, output, json) if len(adapters) > 1 else {adapters[0]: output}
    written_as_gguf = {adapter: is_gguf_written(path, format, adapter) for adapter, path in targets.items()}
    is_gguf = any(written_as_gguf.values())
    if is_gguf and base_model is None:
        raise typer.BadParameter(
            "a GGUF file is written for the model that llama.cpp will run; name it (--base-model), or another format "
            "(--format peft)"
        )
    if not all(written_as_gguf.values()) and outtype is not None:
        raise typer.BadParameter("--outtype is for GGUF files")
    if is_gguf and layout is not None:
        raise typer.BadParameter("--layout is for directories; a GGUF file has the layout of its model")
    keys = [sign_with, require_signature, require_rules_signature]
    models = [base_model, aligned_model]
    check_outputs([*targets.values(), json], [*adapters, subspace, file_of(policy), *models, *keys])
    start = chosen_policy(policy, require_rules_signature)
    if start.overrides and any(penalty is not None for penalty in (aligned, partial, off)):
        raise typer.BadParameter("--aligned, --partial and --off do not reach what the policy's overrides match")
    changes: dict[str, Any] = {
        "aligned": aligned,
        "partial": partial,
        "off": off,
        "rank": parse_rank(rank),
        "keep_uncovered": tuple(keep_uncovered) if keep_uncovered else None,
        "drop_uncovered": tuple(drop_uncovered) if drop_uncovered else None,
        "max_undo": max_undo,
        "max_total_undo": max_total_undo,
        "min_annihilation_ratio": min_annihilation_ratio,
    }
    try:
        chosen = replace(start, **{key: value for key, value in changes.items() if value is not None})
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    from csulora.adapters.lora import CORRECTED_SHA256
    from csulora.serving.provenance import Ingredients, Signer
    from csulora.serving.signatures import Verifier, open_subspace
    from csulora.views.report_table import report_table

    signer = Signer(sign_with) if sign_with else None
    signers = (require_signature, require_rules_signature)
    verifier, rules = (None if who is None else Verifier.open(who) for who in signers)
    opened = open_subspace(subspace, subspace_sha256, rules)
    wanted = cast("Layout | None", layout and layout.value)

    def write(adapter: str, path: Path) -> tuple[Report, str, str]:
        read = functools.partial(csulora.load_adapter, adapter, base_model, expert_layout=expert_layout)
        loaded = verifier.read(adapter, read) if verifier else read()
        fixed, report = csulora.correct(loaded, opened, chosen, wanted, aligned=aligned_model)
        seal = signer.sealing(Ingredients.of(loaded, opened, chosen)) if signer else None
        dtype = outtype and outtype.value
        written = "gguf" if written_as_gguf[adapter] else format.value if format else loaded.format
        sha256 = csulora.save_adapter(fixed, path, written, base_model=base_model, outtype=dtype, seal=seal)
        return report, sha256, written

    if len(adapters) > 1:
        return correct_several(targets, lambda adapter, path: write(adapter, path)[:2], json, quiet)
    report, sha256, written = write(adapters[0], output)
    kind = {"gguf": "a GGUF file", "mlx": "a directory for mlx-lm"}.get(written, "a PEFT directory")
    summary = f"wrote {output}, {kind}: {len(report.measured)} of {len(report.modules)} modules, sha256 {sha256}"
    if report.copies:
        summary += f"\nleft out, as the aligned checkpoint has them: {', '.join(report.copies)} (copies)"
    summary += "".join(f"\n{note}" for note in report.host_notes)
    deliver(report_table(report, every_module), summary, report.to_dict() | {CORRECTED_SHA256: sha256}, json, quiet)
