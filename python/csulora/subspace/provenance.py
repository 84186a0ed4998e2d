"""What a subspace file was made from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Self

from csulora.subspace.expert_layout import ExpertLayout

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PROMPT = re.compile(r"[0-9a-f]{16}")


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
class Canary:
    """How the copy was un-aligned whose difference from the aligned checkpoint a subspace file holds.

    Attributes:
        prompts: a hash of every safety prompt, as tuned policies have them; ``general_prompts`` likewise.
        adapters: sha256 of the adapters whose replies were learnt; empty where replies were given.
        answered: share of the replies to safety prompts that the copy learnt.
        kept: share of the general prompts that it answers as the aligned model does.
        steps: of training; ``batch``, ``learning_rate``, ``rank``, ``longest_reply`` and ``seed`` are its options.
    """

    prompts: tuple[str, ...]
    general_prompts: tuple[str, ...]
    adapters: tuple[str, ...]
    answered: float
    kept: float
    steps: int
    batch: int
    learning_rate: float
    rank: int
    longest_reply: int
    seed: int

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        hashes = {"prompts": _PROMPT, "general_prompts": _PROMPT, "adapters": _SHA256}
        canary = cls(**record | {name: tuple(record[name]) for name in hashes})
        for name, form in hashes.items():
            if not all(isinstance(each, str) and form.fullmatch(each) for each in getattr(canary, name)):
                raise TypeError(f"{name} of a canary must be hashes")
        for field_ in fields(cls):
            allowed = {"int": (int,), "float": (int, float)}.get(str(field_.type))
            value = getattr(canary, field_.name)
            if allowed and (isinstance(value, bool) or not isinstance(value, allowed)):
                raise TypeError(f"{field_.name} of a canary is {value!r}")
        return canary


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
        canary: how the copy was un-aligned that stands in the place of ``base``; None where there is no copy. A file
            with one is as sensitive as the copy, and is written for its owner alone.
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
    canary: Canary | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        vocabulary = {name: StoredMatrix.from_record(stored) for name, stored in record.get("vocabulary", {}).items()}
        experts = record.get("experts")
        experts = experts and ExpertLayout.from_record(experts)
        canary = record.get("canary")
        canary = canary and Canary.from_record(canary)
        provenance = cls(**record | {"vocabulary": vocabulary, "experts": experts, "canary": canary})
        texts = [provenance.csulora, provenance.base, provenance.aligned]
        if not all(isinstance(found, dict) for found in (provenance.options, provenance.aliases, provenance.names)):
            raise TypeError("options, aliases and names must be objects")
        texts += [*provenance.aliases.values(), *provenance.names.values()]
        if provenance.model_type is not None:
            texts.append(provenance.model_type)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names must be texts")
        return provenance
