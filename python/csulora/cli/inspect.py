"""`csulora inspect`: where an update lies and what it undoes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import csulora
from csulora.cli.arguments import (
    Adapters,
    AlignedModel,
    BaseModel,
    EveryModule,
    ExpertOrder,
    Json,
    MaxTotalUndo,
    MaxUndo,
    MinAnnihilationRatio,
    PolicySource,
    Quiet,
    SubspaceSha256,
    check_output,
    check_outputs,
    file_of,
    numbers,
)
from csulora.cli.console import deliver
from csulora.errors import InputError, printable
from csulora.io.files import write_text
from csulora.policy.policy import Policy
from csulora.policy.toml import PRESETS
from csulora.tuning.frontier import Frontier, frontier_path
from csulora.views import tables


def inspect(
    adapters: Adapters,
    subspace: Annotated[Path | None, typer.Option(help="Subspace file of the model the adapters are for.")] = None,
    canary: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Canary of the same model: say how far the update goes to its copy."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="Factor of each adapter in the sum. [default: 1 each]")
    ] = None,
    max_undo: MaxUndo = None,
    max_total_undo: MaxTotalUndo = None,
    min_annihilation_ratio: MinAnnihilationRatio = None,
    aligned_model: AlignedModel = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of adapters that are trusted: say where this one stands among them."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=check_output, help="Write a page with all figures as maps.")
    ] = None,
    policy: PolicySource = None,
    frontier: Annotated[
        Path | None, typer.Option(help="What `csulora tune` measured. [default: what lies beside the policy]")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `csulora evaluate` found, to show the replies side by side.")
    ] = None,
    expert_layout: ExpertOrder = None,
    base_model: BaseModel = None,
    subspace_sha256: SubspaceSha256 = None,
    every_module: EveryModule = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Show what an adapter does, and with --subspace where its update lies and what it undoes.

    With --policy the figures say what a correction would leave; nothing is written but the page.

    Several adapters are taken as applied together: what is shown is their sum.
    """
    if html is None and (frontier is not None or evaluation is not None):
        raise typer.BadParameter("--frontier and --evaluation are shown on a page; name it with --html")
    limits = {
        "max_undo": max_undo,
        "max_total_undo": max_total_undo,
        "min_annihilation_ratio": min_annihilation_ratio,
    }
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    measured = {
        **limits,
        "weights": weights,
        "html": html,
        "policy": policy,
        "aligned_model": aligned_model,
        "reference": reference,
        "canary": canary,
    }
    given = ["--" + name.replace("_", "-") for name, option in measured.items() if option is not None]
    if subspace is None and (given or len(adapters) > 1):
        what = ", ".join(given) or "the sum of several adapters"
        raise typer.BadParameter(f"{what}: needs --subspace FILE, which `csulora extract` makes")
    shown = Policy.none(keep_uncovered=("*",)) if policy is None else Policy.load(policy)
    try:
        limited = replace(shown, **limits)  # type: ignore[arg-type]
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    factors = numbers(weights)
    if factors is not None and len(factors) != len(adapters):
        raise typer.BadParameter(
            f"--weights has {len(factors)} numbers for {len(adapters)} adapters; give one for each"
        )
    measured_with = [subspace, canary, file_of(policy), base_model, aligned_model]
    check_outputs([html, json], [*adapters, *measured_with, frontier, evaluation])
    loaded = [csulora.load_adapter(adapter, base_model, expert_layout=expert_layout) for adapter in adapters]
    if subspace is None:
        document = {"adapter_sha256": loaded[0].sha256, "modules": tables.adapter_rows(loaded[0])}
        summary = f"{printable(adapters[0])}: {len(loaded[0].modules)} modules"
        deliver(tables.adapter_table(loaded[0], every_module), summary, document, json, quiet)
        return
    opened = csulora.Subspace.open(subspace, subspace_sha256)
    whole = loaded[0] if len(loaded) == 1 and weights is None else csulora.combine(loaded, opened, factors)
    from csulora.correction.reference import Reference
    from csulora.evaluation.evaluation import Evaluation
    from csulora.views.html.page import assess, render
    from csulora.views.report_table import reference_sentences, report_table

    opened_canary = csulora.Subspace.open(canary) if canary else None
    assessment = assess(whole, opened, limited, aligned_model, opened_canary)
    if html is not None:
        stated = limited if policy is not None else None
        replies = Evaluation.load(evaluation) if evaluation else None
        write_text(html, render(assessment, opened, stated, _load_frontier(frontier, policy), replies))
    if assessment.refusal:
        raise assessment.refusal
    report = assessment.report
    summary = f"{printable(whole.path)}: {len(report.measured)} of {len(report.modules)} modules are covered"
    if opened.provenance.canary is not None:
        summary += f"\n{subspace} is a canary: undo is how far the update goes towards its un-aligned copy (1: as far)"
    summary += "".join(f"\n{note}" for note in report.host_notes)
    found = report.to_dict()
    if reference is not None:
        trusted = Reference.read(reference, opened, aligned_model, base_model)
        summary += "".join(f"\n{sentence}" for sentence in reference_sentences(trusted, report))
        found["reference"] = trusted.to_dict(report)
    if assessment.canary is not None:
        found["canary"] = assessment.canary.to_dict()
    page = f"\nwrote {html}" if html else ""
    deliver(report_table(report, every_module, assessment.canary), summary + page, found, json, quiet)


def _load_frontier(frontier: Path | None, policy: str | None) -> Frontier | None:
    if frontier is None and policy is not None and policy not in PRESETS:
        beside = frontier_path(Path(policy))
        frontier = beside if beside.exists() else None
    return Frontier.load(frontier) if frontier else None
