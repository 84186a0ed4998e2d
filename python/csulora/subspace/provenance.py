"""What a subspace file was made from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Self

from csulora.subspace.expert_layout import ExpertLayout

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix of the aligned checkpoint, so that a copy of it can be told.

    Attributes:
        dtype: its storage type: ``F16``, ``BF16`` or ``F32``.
        shape: its rows and columns.
        sha256: hex, over its bytes as safetensors stores them: row by row, little-endian.
    """

    dtype: str
    shape: tuple[int, int]
    sha256: str

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        stored = cls(**record | {"shape": tuple(record["shape"])})
        if [type(size) for size in stored.shape] != [int, int]:
            raise TypeError("a matrix must have rows and columns")
        if not isinstance(stored.dtype, str) or not _SHA256.fullmatch(stored.sha256):
            raise TypeError("a content hash is not 64 hexadecimal digits")
        return stored


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
        vocabulary: the aligned checkpoint's embeddings and heads, by name; a tied head is there under its own name too.
        experts: how the model lays out parameters that hold all experts of a layer; None if it has no experts.
        model_type: the aligned checkpoint's, if its config.json names one.
    """

    csulora: str
    base: str
    aligned: str
    options: dict[str, Any]
    aliases: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    vocabulary: dict[str, StoredMatrix] = field(default_factory=dict)
    experts: ExpertLayout | None = None
    model_type: str | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        vocabulary = {name: StoredMatrix.from_record(stored) for name, stored in record.get("vocabulary", {}).items()}
        experts = record.get("experts")
        experts = experts and ExpertLayout.from_record(experts)
        provenance = cls(**record | {"vocabulary": vocabulary, "experts": experts})
        texts = [provenance.csulora, provenance.base, provenance.aligned]
        if not all(isinstance(found, dict) for found in (provenance.options, provenance.aliases, provenance.names)):
            raise TypeError("options, aliases and names must be objects")
        texts += [*provenance.aliases.values(), *provenance.names.values()]
        if provenance.model_type is not None:
            texts.append(provenance.model_type)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names must be texts")
        return provenance
