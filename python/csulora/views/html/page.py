"""One self-contained page about an adapter: no script, no network, nothing but HTML, CSS and SVG.

Names in adapters, subspace files and frontiers are whatever somebody wrote: the template engine escapes every text, and
what cannot be seen or reverses the direction of reading is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from csulora.adapters.lora import Adapter
from csulora.correction.canary_undo import CanaryUndo
from csulora.correction.correct import check_subspace, correct
from csulora.correction.report import COMPONENTS, Report
from csulora.errors import InputError, RefusedError
from csulora.evaluation.evaluation import Evaluation
from csulora.models.names import parse_expert
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning.frontier import Frontier
from csulora.views.html.evaluation_section import EvaluationSection
from csulora.views.html.expert_maps import ExpertMaps
from csulora.views.html.frontier_chart import FrontierChart
from csulora.views.html.heat_maps import heat_maps
from csulora.views.html.numbers import number, percent, undo
from csulora.views.html.spectrum import Spectrum
from csulora.views.layout import Layout

_OFFENDERS = 10
_HEADLINES = {
    "nothing": "The policy takes this adapter's undo away.",
    "some": "The policy leaves part of this adapter's undo.",
    "all": "The policy leaves all of this adapter's undo.",
    "little": "This adapter undoes next to nothing.",
}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Assessment:
    """What a policy does to an adapter.

    Attributes:
        report: what it does; of one that refuses the adapter, what it would do otherwise.
        refusal: what was raised if it refuses the adapter.
        reason: the refusal without the adapter's path.
        canary: undo of a canary, if there is one.
    """

    report: Report
    refusal: RefusedError | None = None
    reason: str = ""
    canary: CanaryUndo | None = None


def assess(
    adapter: Adapter,
    subspace: Subspace,
    policy: Policy,
    aligned: str | Path | None = None,
    canary: Subspace | None = None,
) -> Assessment:
    """Return what the page shows of an adapter, or of what `csulora.combine` made of several.

    Args:
        adapter: the adapter.
        subspace: the subspaces of its model.
        policy: what corrects it.
        aligned: the aligned checkpoint, for annihilation ratios.
        canary: a canary of the model, for its undo.

    Raises:
        RefusedError: the policy was tuned for another subspace file, or a subspace file does not fit the adapter.
        InputError: a file is malformed, or the canary is none.
    """
    check_subspace(policy, subspace)
    refusal, reason = None, ""
    try:
        fixed, report = correct(adapter, subspace, policy, aligned=aligned)
    except RefusedError as error:
        strengths = () if policy.strength_of(adapter.sha256) is None else policy.strengths
        lenient = replace(policy.without_limits(), keep_uncovered=("*",), strengths=strengths)
        refusal, reason = error, str(error).removeprefix(f"{adapter.path}: ")
        fixed, report = correct(adapter, subspace, lenient, aligned=aligned)
    return Assessment(report, refusal, reason, CanaryUndo.of(adapter, fixed, canary) if canary else None)


def render(
    assessment: Assessment,
    subspace: Subspace,
    policy: Policy | None = None,
    frontier: Frontier | None = None,
    evaluation: Evaluation | None = None,
) -> str:
    """Return the page: where the adapter's update lies, what it undoes, and what the policy does to it.

    Args:
        assessment: what `assess` returned.
        subspace: the subspaces of the adapter's model.
        policy: the one that the adapter was assessed with; None: nobody named one, and the page shows none.
        frontier: what `csulora tune` measured with this subspace file.
        evaluation: what `csulora evaluate` found, of this adapter among others.

    Raises:
        InputError: the frontier was measured with another subspace file, or the evaluation is of other adapters.
    """
    if frontier is not None and frontier.subspace_sha256 != subspace.sha256:
        raise InputError(
            f"the frontier was measured with the subspace file {frontier.subspace_sha256}, and this one is "
            f"{subspace.sha256}; name the frontier of this subspace file"
        )
    report = assessment.report
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "undo": undo}
    others = [module for module in report.modules if parse_expert(module.module) is None]
    by_undo = sorted(report.measured, key=lambda module: -(module.undo or 0.0))
    return environment.get_template("page.html").render(
        report=report,
        totals=report.totals,
        strength=policy and policy.strength_of(report.adapter_sha256),
        canary=assessment.canary,
        policy=policy,
        refusal=assessment.reason,
        is_changed=not report.changes_nothing,
        headlines=_HEADLINES,
        components=COMPONENTS,
        provenance=subspace.provenance,
        layout=Layout.of(module.module for module in others),
        maps=heat_maps(report, assessment.canary),
        experts=ExpertMaps.of(report),
        others=others,
        spectrum=Spectrum.of(subspace),
        offenders=by_undo[:_OFFENDERS],
        frontier=FrontierChart.of(frontier) if frontier else None,
        evaluation=EvaluationSection.of(evaluation, report.adapter_sha256) if evaluation else None,
    )


def _visible(value: Any) -> Any:
    """Replace what a reader cannot see: control characters, direction marks, halves of surrogate pairs."""
    if type(value) is not str or value.isprintable():  # not what macros return: it is markup already
        return value
    return "".join(character if character.isprintable() else _REPLACEMENT for character in value)
