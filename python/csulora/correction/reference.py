"""Where an adapter's figures stand among those of adapters that an operator trusts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csulora.adapters.disk import load_adapter
from csulora.adapters.weights_files import CONFIG_FILE
from csulora.correction.correct import correct
from csulora.correction.report import Report
from csulora.errors import CsuloraError, InputError
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace

FIGURES = {"undo": "total undo", "largest_undo": "largest undo", "annihilation_ratio": "annihilation ratio"}


@dataclass(frozen=True)
class Standing:
    """One figure of an adapter among those of others.

    Attributes:
        figure: a key of `FIGURES`.
        value: the adapter's.
        percentile: share of the others, in percent, whose figure is smaller; those that have the same count half.
    """

    figure: str
    value: float
    percentile: float


@dataclass(frozen=True)
class Reference:
    """Adapters that an operator trusts.

    Attributes:
        reports: of those that could be measured, with a policy that changes nothing.
        skipped: name -> why it could not.
    """

    reports: tuple[Report, ...]
    skipped: dict[str, str]

    @classmethod
    def read(
        cls,
        directory: Path,
        subspace: Subspace,
        aligned: str | Path | None = None,
        base_model: str | Path | None = None,
    ) -> Reference:
        """Measure every adapter in a folder: each directory and each GGUF file in it.

        Args:
            directory: the folder.
            subspace: the subspaces of the adapters' model.
            aligned: the aligned checkpoint, for annihilation ratios.
            base_model: the model of adapters that are GGUF files.

        Raises:
            InputError: there is no such folder, or no adapter in it can be measured.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}: no such folder; name one that holds adapters")
        reports, skipped = [], {}
        policy = Policy.none(keep_uncovered=("*",))
        for path in sorted(path for path in directory.iterdir() if path.is_dir() or path.suffix == ".gguf"):
            try:
                adapter = load_adapter(path, base_model if path.suffix == ".gguf" else None)
                reports.append(correct(adapter, subspace, policy, aligned=aligned)[1])
            except CsuloraError as error:
                skipped[path.name] = str(error).removeprefix(f"{path}: ")
        if not reports:
            reasons = [f"; {name}: {reason}" for name, reason in skipped.items()]
            is_adapter = (directory / CONFIG_FILE).is_file()
            advice = "is an adapter; name the folder above it" if is_adapter else "give each adapter a folder in it"
            raise InputError(f"{directory}: holds no adapter that can be measured; {advice}{''.join(reasons[:1])}")
        return cls(tuple(reports), skipped)

    def others(self, report: Report) -> list[Report]:
        """Return the reports of all adapters but this one."""
        return [each for each in self.reports if each.adapter_sha256 != report.adapter_sha256]

    def standings(self, report: Report) -> list[Standing]:
        """Say where an adapter's figures, as it came, stand among the others'; those that are absent are left out."""
        found = []
        for figure in FIGURES:
            value = getattr(report.totals, figure)
            values = [getattr(each.totals, figure) for each in self.others(report)]
            if value is not None and values and None not in values:
                found.append(Standing(figure, value, percentile(value, values)))
        return found

    def to_dict(self, report: Report) -> dict[str, Any]:
        """Return how many others there are, where the adapter stands, and what was skipped, for JSON."""
        standings = {each.figure: asdict(each) for each in self.standings(report)}
        return {"count": len(self.others(report)), "standings": standings, "skipped": self.skipped}


def percentile(value: float, values: Sequence[float]) -> float:
    """Return the share of some values, in percent, that are smaller; the same count half.

    >>> percentile(3.0, [1.0, 2.0, 3.0, 4.0])
    62.5
    """
    smaller, same = sum(each < value for each in values), sum(each == value for each in values)
    return 100 * (smaller + same / 2) / len(values)
