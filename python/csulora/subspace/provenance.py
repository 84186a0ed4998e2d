"""What a subspace file was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Provenance:
    """What a subspace file was made from and how.

    Attributes:
        csulora: the version that made it.
        base: name of the checkpoint before alignment.
        aligned: name of the checkpoint after it.
        options: the extraction's options.
        aliases: further names of tied weights, name in the model -> module in the subspace file.
        names: what transformers calls modules that the checkpoint calls otherwise, likewise.
        model_type: the aligned checkpoint's, if its config.json names one.
    """

    csulora: str
    base: str
    aligned: str
    options: dict[str, Any]
    aliases: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        provenance = cls(**record)
        texts = [provenance.csulora, provenance.base, provenance.aligned]
        if not all(isinstance(found, dict) for found in (provenance.options, provenance.aliases, provenance.names)):
            raise TypeError("options, aliases and names must be objects")
        texts += [*provenance.aliases.values(), *provenance.names.values()]
        if provenance.model_type is not None:
            texts.append(provenance.model_type)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names must be texts")
        return provenance
