"""One module of a subspace file: the truncated SVD of one displacement."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from csulora.errors import InputError
from csulora.subspace.certificate import Certificate
from csulora.subspace.input_filter import InputFilter

FACTORS = ("u", "s", "v")
FILTER_FACTORS = ("p", "q")
SKETCH = "sketch"
FACTOR_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class ModuleSubspace:
    """One module of a subspace file: D ~ u diag(s) v^T for D (out, in), and what it was computed from.

    ``input_filter`` is there in subspace files that `tune` wrote: the inputs on which filtered policies act. ``sketch``
    is W G / sqrt(c) of the aligned W, for Gaussian numbers G (in, c) that the extraction's seed determines.
    """

    u: Tensor  # (out, k) float16, bfloat16 or float32
    s: Tensor  # (k) float32, descending
    v: Tensor  # (in, k), the same dtype as u
    certificate: Certificate
    base_sha256: str
    aligned_sha256: str
    input_filter: InputFilter | None = None
    sketch: Tensor | None = None  # (out, c), the same dtype as u

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
        if self.sketch is not None and (self.sketch.dim() != 2 or self.sketch.shape[0] != self.u.shape[0]):
            raise InputError(f"u is {list(self.u.shape)} and the sketch {list(self.sketch.shape)}; they disagree")
        if self.sketch is not None and self.sketch.dtype != self.u.dtype:
            raise InputError(f"u is {self.u.dtype} and the sketch {self.sketch.dtype}; csulora stores none such")

    @classmethod
    def from_record(cls, record: dict[str, Any], factors: Mapping[str, Tensor]) -> Self:
        """Put a module together; raises KeyError or TypeError unless ``record`` is what `record` returns.

        ``factors`` are u, s and v, p and q if there is an input filter, and the sketch if there is one.
        """
        if set(record) != {"base_sha256", "aligned_sha256", "certificate"}:
            raise TypeError(f"a module's record has the fields {sorted(record)}")
        certificate = Certificate.from_record(record["certificate"])
        base_sha256, aligned_sha256 = record["base_sha256"], record["aligned_sha256"]
        if not all(isinstance(text, str) and _SHA256.fullmatch(text) for text in (base_sha256, aligned_sha256)):
            raise TypeError("a content hash is not 64 hexadecimal digits")
        input_filter = InputFilter(factors["p"], factors["q"]) if "p" in factors else None
        hashes = base_sha256, aligned_sha256
        return cls(factors["u"], factors["s"], factors["v"], certificate, *hashes, input_filter, factors.get(SKETCH))

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
        if self.sketch is not None:
            factors[SKETCH] = self.sketch
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
