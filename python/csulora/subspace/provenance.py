"""What a subspace file was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from csulora.subspace.expert_layout import ExpertLayout


@dataclass(frozen=True)
class Provenance:
    """What a subspace file was made from and how.

    Attributes:
        csulora: the version that made it.
        base: name of the checkpoint before alignment.
        aligned: name of the checkpoint after it.
        options: the extraction's options.
        aliases: further names of tied weights, name in the model -> module in the subspace file.
        experts: how the model lays out parameters that hold all experts of a layer; None if it has no experts.
    """

    csulora: str
    base: str
    aligned: str
    options: dict[str, Any]
    aliases: dict[str, str]
    experts: ExpertLayout | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        experts = record.get("experts")
        provenance = cls(**record | {"experts": experts and ExpertLayout.from_record(experts)})
        texts = [provenance.csulora, provenance.base, provenance.aligned]
        if not isinstance(provenance.options, dict) or not isinstance(provenance.aliases, dict):
            raise TypeError("options and aliases must be objects")
        if not all(isinstance(text, str) for text in [*texts, *provenance.aliases.values()]):
            raise TypeError("names must be texts")
        return provenance
