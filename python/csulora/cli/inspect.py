"""`csulora inspect`: where an update lies and what it undoes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import csulora
from csulora.cli.arguments import (
    Adapters,
    BaseModel,
    EveryModule,
    ExpertOrder,
    Json,
    MaxUndo,
    PolicySource,
    Quiet,
    SubspaceSha256,
    check_output,
    check_outputs,
    numbers,
)
from csulora.cli.console import deliver
from csulora.errors import printable
from csulora.io.files import write_text
from csulora.policy.policy import Policy
from csulora.policy.toml import PRESETS
from csulora.tuning.frontier import Frontier, frontier_path
from csulora.views import tables


def inspect(
    adapters: Adapters,
    subspace: Annotated[Path | None, typer.Option(help="Subspace file of the model the adapters are for.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="Factor of each adapter in the sum. [default: 1 each]")
    ] = None,
    max_undo: MaxUndo = None,
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
        raise typer.BadParameter("--frontier and --evaluation are for --html")
    if subspace is None and any(option is not None for option in (weights, max_undo, html, policy)):
        raise typer.BadParameter("sums, limits, policies and pages need --subspace")
    shown = Policy.none(keep_uncovered=("*",)) if policy is None else Policy.load(policy)
    if max_undo is not None and not math.isfinite(max_undo):
        raise typer.BadParameter(f"--max-undo is {max_undo}; it must be a finite number")
    factors = numbers(weights)
    if factors is not None and len(factors) != len(adapters):
        raise typer.BadParameter(f"--weights has {len(factors)} numbers for {len(adapters)} adapters")
    check_outputs([html, json], [*adapters, subspace, policy, frontier, evaluation, base_model])
    if subspace is None and len(adapters) > 1:
        raise typer.BadParameter("sums need --subspace")
    loaded = [csulora.load_adapter(adapter, base_model, expert_layout=expert_layout) for adapter in adapters]
    if subspace is None:
        document = {"adapter_sha256": loaded[0].sha256, "modules": tables.adapter_rows(loaded[0])}
        summary = f"{printable(adapters[0])}: {len(loaded[0].modules)} modules"
        deliver(tables.adapter_table(loaded[0], every_module), summary, document, json, quiet)
        return
    opened = csulora.Subspace.open(subspace, subspace_sha256)
    whole = loaded[0] if len(loaded) == 1 and weights is None else csulora.combine(loaded, opened, factors)
    limited = shown if max_undo is None else replace(shown, max_undo=max_undo)
    from csulora.evaluation.evaluation import Evaluation
    from csulora.views.html.page import assess, render
    from csulora.views.report_table import report_table

    assessment = assess(whole, opened, limited)
    if html is not None:
        stated = limited if policy is not None else None
        found = Evaluation.load(evaluation) if evaluation else None
        write_text(html, render(assessment, opened, stated, _load_frontier(frontier, policy), found))
    if assessment.refusal:
        raise assessment.refusal
    report = assessment.report
    summary = f"{printable(whole.path)}: {len(report.measured)} of {len(report.modules)} modules are covered"
    summary += "".join(f"\n{note}" for note in report.host_notes)
    page = f"\nwrote {html}" if html else ""
    deliver(report_table(report, every_module), summary + page, report.to_dict(), json, quiet)


def _load_frontier(frontier: Path | None, policy: str | None) -> Frontier | None:
    if frontier is None and policy is not None and policy not in PRESETS:
        beside = frontier_path(Path(policy))
        frontier = beside if beside.exists() else None
    return Frontier.load(frontier) if frontier else None
