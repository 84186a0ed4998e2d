"""What a correction did: for machines as JSON, for people as tables, for whoever finds the adapter as a card."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from rich.console import Group, RenderableType
from rich.table import Table

from csulora import __version__
from csulora.errors import printable
from csulora.native import _core

COMPONENTS = ("aligned", "left", "right", "off")

Status = Literal["corrected", "kept", "dropped"]


@dataclass(frozen=True)
class ModuleReport:
    """What was measured on one module's update and what became of it.

    Attributes:
        module: the module's name in the host's model.
        status: ``corrected``, or for a module the subspace file does not cover ``kept`` or ``dropped``.
        rank: rank before; ``rank_after``: rank after.
        norm: |dW|_F, scale included; None for a module that was dropped.
        energies: |dW_c|^2 / |dW|^2 of the components aligned, left, right and off.
        gains: what each component was multiplied by; with gains of single directions, and where the policy is filtered,
            |X_c| / |dW_c|, which may exceed 1 where something is reinforced.
        undo: share of the alignment inside the subspace that the update cancels; negative reinforces it.
        alignment_norm: |S|, the norm of the displacement inside the subspace.
        relative_change: |X - dW| / |dW|.
        truncation_error: share of |X|^2 given up to reach the rank.
    """

    module: str
    status: Status
    rank: int
    rank_after: int
    norm: float | None = None
    energies: dict[str, float] | None = None
    gains: dict[str, float] | None = None
    undo: float | None = None
    alignment_norm: float | None = None
    relative_change: float | None = None
    truncation_error: float | None = None

    @classmethod
    def corrected(cls, module: str, rank: int, alignment_norm: float, result: _core.Correction) -> Self:
        """Describe one corrected module."""
        return cls(
            module=module,
            status="corrected",
            rank=rank,
            rank_after=result.factors.a.shape[0],
            norm=result.norm,
            energies={component: getattr(result.energies, component) for component in COMPONENTS},
            gains={component: getattr(result.gains, component) for component in COMPONENTS},
            undo=result.undo,
            alignment_norm=alignment_norm,
            relative_change=result.relative_change,
            truncation_error=result.truncation_error,
        )

    @property
    def kept_share(self) -> float:
        """|X|^2 / |dW|^2: what the gains leave of the update, before its rank is cut."""
        energies, gains = self.energies or {}, self.gains or {}
        return sum(energies[component] * gains[component] ** 2 for component in energies)


@dataclass(frozen=True)
class Totals:
    """The whole adapter's figures: the corrected modules' updates seen as one block-diagonal update."""

    uncorrected: float  # share of |dW|^2 in modules that the subspace file does not cover and the policy keeps
    norm: float
    energies: dict[str, float]
    undo: float
    relative_change: float
    truncation_error: float


@dataclass(frozen=True)
class Report:
    """What a correction was made from and what it did. Holds nothing that varies between identical runs."""

    adapter: str
    adapter_sha256: str
    subspace_sha256: str
    fingerprints: dict[str, str]
    policy: dict[str, Any]
    modules: tuple[ModuleReport, ...]
    csulora: str = __version__

    @property
    def measured(self) -> list[ModuleReport]:
        """The modules that the subspace file covers."""
        return [module for module in self.modules if module.status == "corrected"]

    @property
    def kept(self) -> list[ModuleReport]:
        """The modules that the subspace file does not cover and that passed as they were."""
        return [module for module in self.modules if module.status == "kept"]

    @property
    def warning(self) -> str:
        """What passed uncorrected, as the beginning of a sentence about the rest; empty if nothing did."""
        if not self.kept:
            return ""
        count = f"{len(self.kept)} of {len(self.modules)} modules"
        return f"{self.totals.uncorrected:.1%} of |dW|^2 passes uncorrected, in {count}; "

    @property
    def worst_undo(self) -> ModuleReport | None:
        """The module that undoes the largest share of its alignment."""
        return max(self.measured, key=lambda module: _value(module.undo), default=None)

    @property
    def totals(self) -> Totals:
        """Figures of all measured modules together."""
        weights = [_value(module.norm) ** 2 for module in self.measured]
        remaining = [weight * module.kept_share for weight, module in zip(weights, self.measured, strict=True)]
        uncorrected = sum(_value(module.norm) ** 2 for module in self.kept)
        alignment = [_value(module.alignment_norm) ** 2 for module in self.measured]
        energies = {
            component: _mean([(module.energies or {})[component] for module in self.measured], weights)
            for component in COMPONENTS
        }
        return Totals(
            uncorrected=uncorrected / total if (total := uncorrected + sum(weights)) else 0.0,
            norm=math.sqrt(sum(weights)),
            energies=energies,
            undo=_mean([_value(module.undo) for module in self.measured], alignment),
            relative_change=math.sqrt(
                _mean([_value(module.relative_change) ** 2 for module in self.measured], weights)
            ),
            truncation_error=_mean([_value(module.truncation_error) for module in self.measured], remaining),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; an infinite penalty is the text ``inf``."""
        document = asdict(self)
        document["totals"] = asdict(self.totals)
        finite: dict[str, Any] = _spell_infinity(document)
        return finite

    def table(self, limit: int = 8) -> RenderableType:
        """Return tables for a person: totals, and the modules with the largest undo."""
        return Group(_totals_table(self), _modules_table(self, limit))

    def card(self, base_model: str | None) -> str:
        """Return the model card (README.md) of the corrected adapter."""
        return _card(self, base_model)


def _value(number: float | None) -> float:
    return 0.0 if number is None else number


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def _spell_infinity(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _spell_infinity(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_spell_infinity(value) for value in document]
    return "inf" if document == math.inf else document


def _totals_table(report: Report) -> Table:
    totals = report.totals
    warning = f"{report.warning.rstrip()}\n" if report.warning else ""
    title = f"{warning}{len(report.measured)} of {len(report.modules)} modules are covered by the subspace file"
    table = Table(title=title, title_justify="left")
    for column in ("norm", *COMPONENTS, "undo", "relative change", "truncation error"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{totals.norm:.4g}",
        *(f"{totals.energies[component]:.1%}" for component in COMPONENTS),
        f"{totals.undo:+.3f}",
        f"{totals.relative_change:.1%}",
        f"{totals.truncation_error:.2%}",
    )
    return table


def _modules_table(report: Report, limit: int) -> Table:
    table = Table(title="largest undo", title_justify="left")
    table.add_column("module", overflow="fold")
    for column in ("rank", "norm", *COMPONENTS, "undo", "relative change"):
        table.add_column(column, justify="right")
    for module in sorted(report.measured, key=lambda m: -_value(m.undo))[:limit]:
        energies = module.energies or {}
        table.add_row(
            module.module,
            str(module.rank) if module.rank == module.rank_after else f"{module.rank}->{module.rank_after}",
            f"{_value(module.norm):.3g}",
            *(f"{energies[component]:.1%}" for component in COMPONENTS),
            f"{_value(module.undo):+.3f}",
            f"{_value(module.relative_change):.1%}",
        )
    return table


def _as_code(text: str) -> str:
    """Text of a stranger's in Markdown: one line, in which nothing is markup."""
    return f"`{printable(text, 200).replace('`', chr(39))}`"


def _sentence(warning: str) -> str:
    return f"**{warning.removesuffix('; ')}.**"


_CARD = """---
{base_model}library_name: peft
tags:
- lora
- csulora
---

# {adapter}, corrected by csulora {version}
{warning}
This LoRA adapter was corrected after training: its update was split by the subspace in which safety alignment
moved the base model, and the components were attenuated by the policy below. It is plain LoRA with scale 1.

| | |
|---|---|
| policy | `{policy}` |
| modules corrected | {corrected} of {modules} |
| relative change of the update | {relative_change:.1%} |
| undo before correction | {undo:+.3f} |
| sha256 of the original adapter | `{adapter_sha256}` |
| sha256 of the subspace file | `{subspace_sha256}` |

`csulora_report.json` holds the figures of every module. A statement of having been corrected proves nothing by
itself: correct what you serve.
"""


def _card(report: Report, base_model: str | None) -> str:
    policy = ", ".join(f"{key}={value}" for key, value in report.policy.items() if key != "overrides")
    overrides = len(report.policy.get("overrides", ()))
    return _CARD.format(
        base_model=f"base_model: {json.dumps(base_model)}\n" if base_model else "",  # JSON's texts are YAML's too
        adapter=_as_code(report.adapter),
        warning=f"\n{_sentence(report.warning)}\n" if report.warning else "",
        version=report.csulora,
        policy=policy + (f", {overrides} overrides" if overrides else ""),
        corrected=len(report.measured),
        modules=len(report.modules),
        relative_change=report.totals.relative_change,
        undo=report.totals.undo,
        adapter_sha256=report.adapter_sha256,
        subspace_sha256=report.subspace_sha256,
    )
