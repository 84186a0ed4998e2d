"""What `csulora tune` measured: how well each policy keeps the task and the alignment, on prompts that chose nothing.

A frontier lies beside the policy it led to, ``policy.toml`` and ``policy.frontier.json``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Self

from csulora.errors import InputError
from csulora.io.files import parse_json, read_regular, to_json, write_text

FORMAT_VERSION = 3
Z = 1.959964  # of the normal distribution's 97.5 %
_LARGEST_FILE = 16 << 20  # bytes


@dataclass(frozen=True)
class Rate:
    """A share of ``count`` prompts, with its 95 % interval (Wilson's)."""

    value: float
    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        """Check that the numbers are shares; raises TypeError or ValueError."""
        if not 0 <= self.low <= self.value <= self.high <= 1 or type(self.count) is not int or self.count < 1:
            raise ValueError(f"{self} is no share with an interval")

    def __str__(self) -> str:
        """Write the share with its interval.

        >>> str(Rate.of(8, 8))
        '1.00 (0.68 to 1.00)'
        """
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    @classmethod
    def of(cls, hits: int, count: int) -> Self:
        """Return the share ``hits / count`` with Wilson's score interval.

        >>> rate = Rate.of(8, 8)
        >>> rate.value, round(rate.low, 2), rate.high
        (1.0, 0.68, 1.0)
        """
        share = hits / count
        scale = 1 + Z * Z / count
        centre = (share + Z * Z / (2 * count)) / scale
        half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / scale
        return cls(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share), count)


@dataclass(frozen=True)
class Refusals:
    """Shares of the safety and task prompts in the test split that are refused; of the latter, none should be."""

    safety: Rate
    task: Rate


@dataclass(frozen=True)
class Point:
    """One policy on the frontier, on the test split. Two replies match if their first 8 tokens match; a prompt counts
    once for each adapter.

    Attributes:
        family: what the policy belongs to: ``none``, ``csulora``, ``project``, ``protect``, ``aligned-only``,
            ``tuned``, ``tuned everywhere``, ``scaling``, ``tuned scaling``, ``tuned random subspace``,
            ``tuned own subspace``.
        policy: the policy in words, its numbers included.
        control: whether it is no candidate but what candidates are compared with.
        safety: share of the safety prompts that are answered as the aligned model does.
        task: share of the task prompts that are answered as the uncorrected adapter does.
        relative_change: |X - dW| / |dW| over all modules, 0 or more.
        refusals: what is refused, where it was said how refusals read.
        general: share of the general prompts, if there are any, that are answered as the aligned model or
            the uncorrected adapter does, or, where refusals are counted, at all.
        validation: `least` on the validation split, by which policies are chosen; None: they are chosen by `least`.
    """

    family: str
    policy: str
    control: bool
    safety: Rate
    task: Rate
    relative_change: float
    refusals: Refusals | None = None
    general: Rate | None = None
    validation: Rate | None = None

    @property
    def choice(self) -> Rate:
        """What policies are chosen by."""
        return self.validation or self.least

    @property
    def safety_kept(self) -> Rate:
        """What is kept of the alignment: safety prompts that are refused where that is counted, else `safety`."""
        return self.refusals.safety if self.refusals else self.safety

    @property
    def least(self) -> Rate:
        """The smallest of what is kept of the alignment, of the task and of all else, and of their intervals' ends."""
        rates = [rate for rate in (self.safety_kept, self.task, self.general) if rate]
        return Rate(*map(min, zip(*map(astuple, rates), strict=True)))

    @property
    def score(self) -> float:
        """The value of `least`.

        >>> Point("protect", "protect 1", False, Rate.of(6, 8), Rate.of(7, 8), relative_change=0.3).score
        0.75
        """
        return self.least.value

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises KeyError, TypeError or ValueError for anything else."""
        refused = record.get("refusals")
        optional = {
            "refusals": None if refused is None else Refusals(**_rates(refused)),
        } | {name: None if record.get(name) is None else Rate(**record[name]) for name in ("general", "validation")}
        point = cls(**(record | _rates(record) | optional))
        if not isinstance(point.family, str) or not isinstance(point.policy, str):
            raise TypeError("family and policy must be texts")
        if not isinstance(point.control, bool) or not 0 <= point.relative_change <= sys.float_info.max:
            raise TypeError("control must be a truth value, and relative_change a finite number")
        return point


def _rates(record: dict[str, Any]) -> dict[str, Rate]:
    return {name: Rate(**record[name]) for name in ("safety", "task")}


@dataclass(frozen=True)
class Frontier:
    """All policies that were tried on one set of adapters and prompts.

    Attributes:
        subspace_sha256: the subspace file.
        adapters: names of the adapters; with several, each point is measured on adapters it was not fitted on.
        points: the policies, controls included.
        recommended: `Point.policy` of the recommended one; None if no policy beats plain scaling.
        written: `Point.policy` of the one in the policy file: the recommended one, or else the best there is.
        verdict: one sentence for people.
        prompts: how many prompts of each kind each split has, added up over adapters: split -> kind -> number.
    """

    subspace_sha256: str
    adapters: tuple[str, ...]
    points: tuple[Point, ...]
    recommended: str | None
    written: str
    verdict: str
    prompts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def counts_refusals(self) -> bool:
        """Whether every point says what is refused."""
        return all(point.refusals for point in self.points)

    @property
    def has_general(self) -> bool:
        """Whether every point says what becomes of general prompts."""
        return all(point.general for point in self.points)

    def save(self, path: str | Path) -> None:
        """Write the frontier as JSON, atomically."""
        write_text(Path(path), to_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return the frontier as its JSON document."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a frontier.

        Raises:
            InputError: the file is none, or damaged.
        """
        document = parse_json(read_regular(Path(path), _LARGEST_FILE), Path(path))
        version = document.pop("format", None)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path}: frontier format {version}; this csulora reads format {FORMAT_VERSION}; "
                "make it again with `csulora tune`"
            )
        try:
            points = tuple(Point.from_record(record) for record in document.pop("points"))
            frontier = cls(adapters=tuple(document.pop("adapters")), points=points, **document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a frontier as `csulora tune` writes it ({error!r})") from error
        texts = [frontier.subspace_sha256, frontier.verdict, frontier.written, *frontier.adapters]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: not a frontier as `csulora tune` writes it (a name is no text)")
        return frontier


def frontier_path(policy: Path) -> Path:
    """Return where the frontier of a policy file lies.

    >>> frontier_path(Path("policies/chat.toml")).name
    'chat.frontier.json'
    """
    return policy.with_suffix(".frontier.json")
