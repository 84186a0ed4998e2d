"""Subspace packs: the truncated SVD of every displacement of one model pair, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from csulora.core import _core
from csulora.errors import InputError
from csulora.files import atomic_file, sha256_of_file

FORMAT_VERSION = 1
FACTOR_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

# All metadata is one JSON text under one key, because safetensors does not fix the order of several.
_METADATA_KEY = "csulora"


@dataclass(frozen=True)
class Certificate:
    """What is known about one subspace's accuracy, measured in float64 on the factors as stored.

    Attributes:
        displacement_norm2: |D|_F^2.
        captured: 1 - |D - U S V^T|^2 / |D|^2.
        residual: max over i of max(|D v - s u|, |D^T u - s v|) / s.
        orthonormality: max(|U^T U - I|_F, |V^T V - I|_F).
        next_value: upper estimate of the next singular value.
        missed: bound on the share of the true left or right subspace that is missed; 1 means nothing is known.
        noise_edge: singular values below it cannot be told from storage rounding.
        above_noise: how many computed singular values lie above ``noise_edge``.
        passes: products with D and its transpose; 0 for an exact SVD.
    """

    displacement_norm2: float
    captured: float
    residual: float
    orthonormality: float
    next_value: float
    missed: float
    noise_edge: float
    above_noise: int
    passes: int

    @classmethod
    def from_core(cls, certificate: _core.Certificate) -> Certificate:
        """Convert the compiled core's certificate."""
        return cls(**{field.name: getattr(certificate, field.name) for field in fields(cls)})

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Certificate:
        """Read what `dataclasses.asdict` wrote; raises TypeError unless every field is a number of its type."""
        certificate = cls(**record)
        for field in fields(cls):
            allowed = (int,) if field.type == "int" else (int, float)
            value = getattr(certificate, field.name)
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise TypeError(f"certificate field {field.name} is {value!r}")
        return certificate


@dataclass(frozen=True)
class ModuleSubspace:
    """One module's part of a pack: D ~ u diag(s) v^T for D (out, in), and what it was computed from."""

    u: torch.Tensor  # (out, k)
    s: torch.Tensor  # (k) float32, descending
    v: torch.Tensor  # (in, k)
    certificate: Certificate
    base_sha256: str
    aligned_sha256: str

    @property
    def rank(self) -> int:
        """Number of directions kept; 0 if alignment did not move the matrix above rounding noise."""
        return self.s.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight matrix."""
        return self.u.shape[0], self.v.shape[0]

    def to_core(self) -> _core.Subspace:
        """Return the factors as the compiled core takes them."""
        return _core.Subspace(self.u, self.s, self.v)

    def provenance(self) -> dict[str, Any]:
        """Return everything but the factors, for JSON."""
        return {
            "base_sha256": self.base_sha256,
            "aligned_sha256": self.aligned_sha256,
            "certificate": asdict(self.certificate),
        }


class Subspace(Mapping[str, ModuleSubspace]):
    """A subspace pack: a mapping from module name to `ModuleSubspace`, with its provenance."""

    def __init__(self, modules: Mapping[str, ModuleSubspace], provenance: dict[str, Any]) -> None:
        """Assemble a pack; ``provenance`` holds the names of both checkpoints, options and aliases."""
        self._modules = dict(sorted(modules.items()))
        self.provenance = provenance
        self.path: Path | None = None

    def __getitem__(self, module: str) -> ModuleSubspace:
        return self._modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied weights: name in the model -> module in the pack."""
        aliases: dict[str, str] = self.provenance.get("aliases", {})
        return aliases

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Return one sha256 per checkpoint, over the names and content hashes of the extracted tensors."""
        prints = {}
        for side in ("base", "aligned"):
            digest = hashlib.sha256()
            for name, module in self.items():
                digest.update(f"{name}\0{getattr(module, f'{side}_sha256')}\n".encode())
            prints[side] = digest.hexdigest()
        return prints

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the pack file's bytes."""
        if self.path is not None:
            return sha256_of_file(self.path)
        return hashlib.sha256(safetensors.torch.save(self._tensors(), self._metadata())).hexdigest()

    @classmethod
    def open(cls, path: str | Path) -> Subspace:
        """Map a pack file. Its structure is validated before use; factors are read when they are needed.

        Raises:
            InputError: the file is not a pack, or its parts contradict each other.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; make a pack with `csulora extract`") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable safetensors file: {error}") from error
        pack = _parse(path, metadata, tensors)
        pack.path = path
        return pack

    def save(self, path: str | Path) -> None:
        """Write the pack to ``path``, complete or not at all."""
        path = Path(path)
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(self._tensors(), temporary, self._metadata())
        self.path = path
        self.__dict__.pop("sha256", None)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{factor}": getattr(module, factor).contiguous()
            for name, module in self.items()
            for factor in ("u", "s", "v")
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the factors, for JSON."""
        return {
            **self.provenance,
            "format": FORMAT_VERSION,
            "fingerprints": self.fingerprints,
            "modules": {name: module.provenance() for name, module in self.items()},
        }

    def _metadata(self) -> dict[str, str]:
        return {_METADATA_KEY: json.dumps(self.to_dict(), sort_keys=True)}


def _parse(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Subspace:
    try:
        document = json.loads(metadata[_METADATA_KEY])
        version = document.pop("format")
        claimed = document.pop("fingerprints")
        records = document.pop("modules")
        modules = {str(name): _module(name, record, tensors) for name, record in records.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a csulora subspace pack ({error!r})") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: pack format {version}; this csulora reads format {FORMAT_VERSION}")
    if len(tensors) != 3 * len(modules):
        raise InputError(f"{path}: holds tensors that no module accounts for")
    pack = Subspace(modules, document)
    if pack.fingerprints != claimed:
        raise InputError(f"{path}: fingerprints and module hashes contradict each other; the pack was tampered with")
    if any(target not in pack for target in pack.aliases.values()):
        raise InputError(f"{path}: an alias names a module that the pack does not hold")
    return pack


def _module(name: str, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ModuleSubspace:
    u, s, v = (tensors[f"{name}.{factor}"] for factor in ("u", "s", "v"))
    try:
        _core.validate(_core.Subspace(u, s, v))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    certificate = Certificate.from_record(record["certificate"])
    return ModuleSubspace(u, s, v, certificate, str(record["base_sha256"]), str(record["aligned_sha256"]))
