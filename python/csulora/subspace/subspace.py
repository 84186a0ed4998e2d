"""Subspace files: the truncated SVD of every displacement of one model pair, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csulora.errors import InputError, RefusedError
from csulora.io.files import atomic_file, identity_of_file, parse_json, save_tensors, sha256_of_file
from csulora.native import _core
from csulora.subspace.input_filter import InputFilter

FORMAT_VERSION = 2
FACTORS = ("u", "s", "v")
FILTER_FACTORS = ("p", "q")
FACTOR_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

_CPU = torch.device("cpu")

# All metadata is one JSON text under one key, because safetensors does not fix the order of several.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_METADATA_KEY = "csulora"


@dataclass(frozen=True)
class Certificate:
    """What is known about one subspace's accuracy, measured on the factors as stored; rounding counts against it.

    Attributes:
        displacement_norm2: |D|_F^2.
        captured_energy: 1 - |D - U S V^T|^2 / |D|^2, at least.
        residual: max over i of max(|D v - s u|, |D^T u - s v|) / s.
        orthonormality: max(|U^T U - I|_F, |V^T V - I|_F).
        next_value: upper estimate of the next singular value.
        subspace_error: bound on the share of the true left or right subspace that is missed; 1 means nothing is known.
        noise_edge: singular values below it cannot be told from storage rounding.
        above_noise: how many computed singular values lie above ``noise_edge``.
        passes: products with D and its transpose; 0 for a full decomposition.
    """

    displacement_norm2: float
    captured_energy: float
    residual: float
    orthonormality: float
    next_value: float
    subspace_error: float
    noise_edge: float
    above_noise: int
    passes: int

    @classmethod
    def from_core(cls, certificate: _core.Certificate) -> Self:
        """Convert the compiled core's certificate."""
        return cls(**{field.name: getattr(certificate, field.name) for field in fields(cls)})

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError unless every field is a finite number of its type."""
        certificate = cls(**record)
        for field in fields(cls):
            allowed = (int,) if field.type == "int" else (int, float)
            value = getattr(certificate, field.name)
            if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
                raise TypeError(f"certificate field {field.name} is {value!r}")
        return certificate


@dataclass(frozen=True, eq=False)
class ModuleSubspace:
    """One module of a subspace file: D ~ u diag(s) v^T for D (out, in), and what it was computed from.

    ``input_filter`` is there in subspace files that `tune` wrote: the inputs on which filtered policies act.
    """

    u: Tensor  # (out, k) float16, bfloat16 or float32
    s: Tensor  # (k) float32, descending
    v: Tensor  # (in, k), the same dtype as u
    certificate: Certificate
    base_sha256: str
    aligned_sha256: str
    input_filter: InputFilter | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading the factors."""
        directions = tuple(self.s.shape)
        if self.u.dim() != 2 or self.v.dim() != 2 or {tuple(self.u.shape[1:]), tuple(self.v.shape[1:])} != {directions}:
            shapes = (list(factor.shape) for factor in (self.u, self.s, self.v))
            raise InputError("u is {}, s {} and v {}; they must agree on the number of directions".format(*shapes))
        if self.s.dtype != torch.float32 or self.u.dtype != self.v.dtype or self.u.dtype not in FACTOR_DTYPES.values():
            raise InputError(f"u is {self.u.dtype}, s {self.s.dtype} and v {self.v.dtype}; csulora stores none such")
        if self.input_filter and self.input_filter.p.shape[0] != self.v.shape[0]:
            raise InputError(
                f"v is {list(self.v.shape)} and the input filter's p {list(self.input_filter.p.shape)}; they disagree"
            )

    @classmethod
    def from_record(cls, record: dict[str, Any], factors: Mapping[str, Tensor]) -> Self:
        """Put a module together; raises KeyError or TypeError unless ``record`` is what `record` returns.

        ``factors`` are u, s and v, and p and q if there is an input filter.
        """
        if set(record) != {"base_sha256", "aligned_sha256", "certificate"}:
            raise TypeError(f"a module's record has the fields {sorted(record)}")
        certificate = Certificate.from_record(record["certificate"])
        base_sha256, aligned_sha256 = record["base_sha256"], record["aligned_sha256"]
        if not all(isinstance(text, str) and _SHA256.fullmatch(text) for text in (base_sha256, aligned_sha256)):
            raise TypeError("a content hash is not 64 hexadecimal digits")
        input_filter = InputFilter(factors["p"], factors["q"]) if "p" in factors else None
        return cls(factors["u"], factors["s"], factors["v"], certificate, base_sha256, aligned_sha256, input_filter)

    def record(self) -> dict[str, Any]:
        """Return everything but the factors, for JSON."""
        return {
            "base_sha256": self.base_sha256,
            "aligned_sha256": self.aligned_sha256,
            "certificate": asdict(self.certificate),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors by their names in a file."""
        factors = {factor: getattr(self, factor) for factor in FACTORS}
        if self.input_filter:
            factors |= {factor: getattr(self.input_filter, factor) for factor in FILTER_FACTORS}
        return factors

    @property
    def rank(self) -> int:
        """Number of directions kept; 0 if alignment did not move the matrix above rounding noise."""
        return self.s.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight matrix."""
        return self.u.shape[0], self.v.shape[0]

    @cached_property
    def norm(self) -> float:
        """|S|: the norm of the displacement inside the subspace."""
        return float(self.s.double().norm())


@dataclass(frozen=True)
class Provenance:
    """What a subspace file was made from and how.

    Attributes:
        csulora: the version that made it.
        base: name of the checkpoint before alignment.
        aligned: name of the checkpoint after it.
        options: the extraction's options.
        aliases: further names of tied weights, name in the model -> module in the subspace file.
    """

    csulora: str
    base: str
    aligned: str
    options: dict[str, Any]
    aliases: dict[str, str]

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote; raises TypeError for anything else."""
        provenance = cls(**record)
        texts = [provenance.csulora, provenance.base, provenance.aligned]
        if not isinstance(provenance.options, dict) or not isinstance(provenance.aliases, dict):
            raise TypeError("options and aliases must be objects")
        if not all(isinstance(text, str) for text in [*texts, *provenance.aliases.values()]):
            raise TypeError("names must be texts")
        return provenance


class Subspace(Mapping[str, ModuleSubspace]):
    """All subspaces of a model pair: a mapping from module name to `ModuleSubspace`, with its provenance.

    >>> found = csulora.Subspace.open(subspace)
    >>> found["model.layers.0.self_attn.q_proj"].shape
    (128, 128)
    """

    obtained_by: ClassVar[str] = "csulora.Subspace.open(path)"

    def __init__(self, modules: Mapping[str, ModuleSubspace], provenance: Provenance) -> None:
        """Assemble what a subspace file holds, in memory."""
        self._modules = dict(sorted(modules.items()))
        self._validated: dict[tuple[str, torch.device], _core.Subspace] = {}
        self._input_filters: dict[tuple[str, torch.device], InputFilter] = {}
        self._source: tuple[Path, tuple[int, ...]] | None = None
        self.provenance = provenance

    def __getitem__(self, module: str) -> ModuleSubspace:
        return self._modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied weights: name in the model -> module in the subspace file."""
        return self.provenance.aliases

    def to_core(self, modules: Iterable[str], device: torch.device = _CPU) -> list[_core.Subspace]:
        """Return the factors of some modules as the compiled core takes them, on a device, where they then stay.

        Their values are validated when they are first asked for on the device, which costs one read of u and v.

        Raises:
            InputError: they are not finite, not in order or not orthonormal.
        """
        modules = list(modules)
        fresh = {name: self._modules[name] for name in modules if (name, device) not in self._validated}
        subspaces = {
            name: _core.Subspace(*(factor.to(device) for factor in (module.u, module.s, module.v)))
            for name, module in fresh.items()
        }
        try:
            _core.validate(list(subspaces.items()))
        except InputError as error:
            raise InputError(f"{self._origin}: {error}") from error
        self._validated |= {(name, device): subspace for name, subspace in subspaces.items()}
        return [self._validated[name, device] for name in modules]

    @property
    def is_filtered(self) -> bool:
        """Whether filtered policies can be used: there is an input filter for some module."""
        return any(module.input_filter for module in self.values())

    def input_filter(self, module: str, device: torch.device = _CPU) -> InputFilter | None:
        """Return a module's input filter on a device, where it then stays; None where corrections act on every input.

        Raises:
            InputError: its values are not finite.
        """
        input_filter = self._modules[module].input_filter
        if input_filter and (module, device) not in self._input_filters:
            if not bool(input_filter.p.isfinite().all() and input_filter.q.isfinite().all()):
                raise InputError(f"{self._origin}: {module}: the input filter holds NaN or infinity")
            self._input_filters[module, device] = input_filter.to(device)
        return self._input_filters.get((module, device))

    def with_input_filters(self, input_filters: Mapping[str, InputFilter]) -> Subspace:
        """Return the same subspaces, whose modules have these input filters and no others."""
        modules = {name: replace(module, input_filter=input_filters.get(name)) for name, module in self.items()}
        subspace = Subspace(modules, self.provenance)
        subspace._validated = self._validated  # of the same factors
        return subspace

    @property
    def _origin(self) -> Path | str:
        return self._source[0] if self._source else "subspace"

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
        """Hex sha256 of the subspace file's bytes, or of those that `save` would write.

        Raises:
            InputError: the file is no longer the one that was opened.
        """
        if self._source is None:
            return hashlib.sha256(safetensors.torch.save(self._tensors(), self._metadata())).hexdigest()
        path, identity = self._source
        digest = sha256_of_file(path)
        if identity_of_file(path) != identity:
            raise InputError(f"{path}: has changed since it was opened; open it again")
        return digest

    @classmethod
    def open(cls, path: str | Path, sha256: str | None = None) -> Self:
        """Map a subspace file and check its structure; factors are read, and checked by `to_core`, as they are needed.

        Args:
            path: the file.
            sha256: the one content, in hex, that is accepted; None: any.

        Raises:
            InputError: the file is not a subspace file, or its contents contradict each other.
            RefusedError: it is another subspace file than ``sha256`` says.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; make a subspace file with `csulora extract`")
        try:
            identity = identity_of_file(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable safetensors file: {error}") from error
        subspace = cls._parse(path, metadata, tensors)
        subspace._source = path, identity
        if sha256 is not None and subspace.sha256 != sha256.strip().lower():
            raise RefusedError(
                f"{path}: has sha256 {subspace.sha256}, and {sha256} is asked for; it is another subspace file"
            )
        return subspace

    @classmethod
    def _parse(cls, path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Self:
        if _METADATA_KEY not in metadata:
            raise InputError(f"{path}: not a subspace file; make one with `csulora extract`")
        document = parse_json(metadata[_METADATA_KEY].encode(), path)
        version = document.pop("format", None)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path}: subspace file format {version}; this csulora reads format {FORMAT_VERSION}; "
                "make it again with `csulora extract`"
            )
        try:
            fingerprints, records = document.pop("fingerprints"), document.pop("modules")
            subspace = cls(
                {name: _module(name, record, tensors) for name, record in records.items()},
                Provenance.from_record(document),
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{path}: the subspace file's metadata is damaged ({error!r})") from error
        if len(tensors) != len(subspace._tensors()):
            raise InputError(f"{path}: holds tensors that no module accounts for")
        if subspace.fingerprints != fingerprints:
            raise InputError(
                f"{path}: fingerprints and content hashes contradict each other; the subspace file is damaged"
            )
        if any(target not in subspace for target in subspace.aliases.values()):
            raise InputError(f"{path}: an alias names a module that the subspace file does not hold")
        return subspace

    def save(self, path: str | Path) -> None:
        """Write the subspace file to ``path``, complete or not at all."""
        with atomic_file(Path(path)) as temporary:
            save_tensors(self._tensors(), temporary, self._metadata())

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{factor}": tensor.contiguous()
            for name, module in self.items()
            for factor, tensor in module.tensors().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the factors, for JSON."""
        return {
            **asdict(self.provenance),
            "format": FORMAT_VERSION,
            "fingerprints": self.fingerprints,
            "modules": {name: module.record() for name, module in self.items()},
        }

    def _metadata(self) -> dict[str, str]:
        return {_METADATA_KEY: json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)}


def _module(name: str, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> ModuleSubspace:
    every = (*FACTORS, *FILTER_FACTORS)
    factors = {factor: tensors[f"{name}.{factor}"] for factor in every if f"{name}.{factor}" in tensors}
    if not set(FACTORS) <= set(factors) or len(set(FILTER_FACTORS) & set(factors)) == 1:
        raise InputError(f"{name}: a factor is missing")
    try:
        return ModuleSubspace.from_record(record, factors)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
