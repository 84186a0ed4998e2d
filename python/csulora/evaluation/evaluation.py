"""What an evaluation found, as its file holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from csulora import __version__
from csulora.errors import InputError
from csulora.evaluation.benchmarks import Scores
from csulora.evaluation.outcomes import Outcome, Tally
from csulora.evaluation.statistics import Paired
from csulora.io.files import parse_json, read_regular, to_json, write_text

FORMAT_VERSION = 1
_LARGEST_FILE = 1 << 30  # bytes
KINDS = ("safety", "task", "general")  # of prompts
Role = Literal["model", "raw", "policy", "scaling"]


@dataclass(frozen=True)
class Row:
    """One way to serve an adapter, and what it replied.

    Attributes:
        name: ``model alone``, ``raw``, a policy's name, or a scaling's factor.
        role: which of these it is.
        policy: the policy itself, or the one whose relative change a scaling has; None for ``model`` and ``raw``.
        relative_change: |X - dW| / |dW|; None for the model alone and where the policy refuses the adapter.
        refusal: why the policy refuses the adapter; None if it does not. There are no replies then.
        outcomes: kind of prompt -> the outcome of every reply, in the order of the prompts.
        scores: task of lm-eval -> metric -> value.
    """

    name: str
    role: Role
    policy: str | None
    relative_change: float | None
    refusal: str | None
    outcomes: dict[str, tuple[Outcome, ...]]
    scores: Scores = field(default_factory=dict)

    def tally(self, kind: str) -> Tally:
        """Count what became of the replies to one kind of prompt."""
        return Tally.of(self.outcomes[kind])

    def to_dict(self) -> dict[str, Any]:
        """Return the row with its counts, for JSON."""
        return asdict(self) | {"tallies": {kind: asdict(self.tally(kind)) for kind in self.outcomes}}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote; raises KeyError, TypeError or ValueError for anything else."""
        fields = {name: value for name, value in record.items() if name != "tallies"}
        fields["outcomes"] = {
            kind: tuple(Outcome(**each) for each in record["outcomes"][kind])
            for kind in KINDS
            if kind in record["outcomes"]
        }
        row = cls(**fields)
        if row.role not in get_args(Role) or not isinstance(row.name, str):
            raise ValueError(f"{row.role!r} is no role of a row")
        if not all(isinstance(value, float) for metrics in row.scores.values() for value in metrics.values()):
            raise TypeError("a score is no number")
        if not all(isinstance(each.text, str) for outcomes in row.outcomes.values() for each in outcomes):
            raise TypeError("a reply is no text")
        return row


@dataclass(frozen=True)
class Comparison:
    """A policy beside the raw adapter, or beside plain scaling at equal relative change, on the same prompts.

    Attributes:
        policy: its name.
        versus: the name of the other row.
        role: ``raw`` or ``scaling``, of the other row.
        kind: of the prompts.
        what: ``same``, ``refused`` or ``unsafe``, see `csulora.evaluation.outcomes.Outcome`.
        paired: how often only one of both is.
    """

    policy: str
    versus: str
    role: Role
    kind: str
    what: str
    paired: Paired


@dataclass(frozen=True)
class AdapterEvaluation:
    """What became of one adapter.

    Attributes:
        adapter: its name.
        sha256: of its content.
        prompts: kind of prompt -> the prompts, as chats of role and content.
        rows: the ways to serve it, the model alone and the raw adapter first.
        comparisons: of the policies.
    """

    adapter: str
    sha256: str
    prompts: dict[str, tuple[tuple[dict[str, str], ...], ...]]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what stands in a file; raises KeyError, TypeError or ValueError for anything else."""
        prompts = {kind: tuple(map(_chat, record["prompts"][kind])) for kind in KINDS if kind in record["prompts"]}
        rows = tuple(map(Row.from_record, record["rows"]))
        for row in rows:
            if any(len(outcomes) != len(prompts[kind]) for kind, outcomes in row.outcomes.items()):
                raise ValueError(f"{row.name} has another number of replies than there are prompts")
        comparisons = tuple(Comparison(**each | {"paired": Paired(**each["paired"])}) for each in record["comparisons"])
        return cls(str(record["adapter"]), str(record["sha256"]), prompts, rows, comparisons)


def _chat(turns: Sequence[dict[str, Any]]) -> tuple[dict[str, str], ...]:
    if not turns:
        raise ValueError("a prompt has no turns")
    return tuple({"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns)


@dataclass(frozen=True)
class Evaluation:
    """What became of adapters under several policies, on prompts that nothing was fitted to.

    Attributes:
        model: the aligned model, as it was named.
        subspace_sha256: of the subspace file.
        adapters: one entry each.
        csulora: version.
    """

    model: str
    subspace_sha256: str
    adapters: tuple[AdapterEvaluation, ...]
    csulora: str = __version__

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of prompt."""
        return tuple(self.adapters[0].prompts)

    @property
    def counts_refusals(self) -> bool:
        """Whether refusals were counted."""
        first = next(iter(self.adapters[0].rows[0].outcomes.values()))
        return first[0].refused is not None

    @property
    def is_judged(self) -> bool:
        """Whether a judge was asked about replies to safety prompts."""
        return self.adapters[0].rows[0].outcomes["safety"][0].unsafe is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as its JSON document."""
        adapters = [asdict(each) | {"rows": [row.to_dict() for row in each.rows]} for each in self.adapters]
        return {"format": FORMAT_VERSION, **asdict(self), "adapters": adapters}

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, atomically."""
        write_text(Path(path), to_json(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an evaluation.

        Raises:
            InputError: the file is none, or damaged.
        """
        document = parse_json(read_regular(Path(path), _LARGEST_FILE), Path(path))
        if document.get("format") != FORMAT_VERSION:
            raise InputError(
                f"{path}: evaluation format {document.get('format')}; this csulora reads format {FORMAT_VERSION}; "
                "make it again with `csulora evaluate`"
            )
        try:
            adapters = tuple(map(AdapterEvaluation.from_record, document["adapters"]))
            return cls(str(document["model"]), str(document["subspace_sha256"]), adapters, str(document["csulora"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not an evaluation as `csulora evaluate` writes it ({error!r})") from error
