"""How a model lays out the parameters that hold all experts of a layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class ExpertLayout:
    """What an adapter's factors do not show of the parameters that they are for.

    Attributes:
        interleaved: rows of gate and up alternate in ``gate_up_proj``; otherwise the gate's come first.
        exchanged: PEFT's B A is (in, out), so that A belongs to the outputs.
        per_expert: hosts also read factors of one expert at a time, and PEFT fuses them as it loads them.
        dropped_by_peft: hosts also read factors of one expert at a time, but PEFT drops them.
    """

    interleaved: bool = False
    exchanged: bool = False
    per_expert: bool = False
    dropped_by_peft: bool = False

    @property
    def is_read_per_expert(self) -> bool:
        """Whether any host reads factors of one expert at a time."""
        return self.per_expert or self.dropped_by_peft

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        layout = cls(**record)
        if not all(isinstance(value, bool) for value in asdict(layout).values()):
            raise TypeError("an expert layout's fields are true or false")
        return layout
