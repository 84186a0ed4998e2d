"""What is known about the accuracy of one module's subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from csulora.native import _core


@dataclass(frozen=True)
class Certificate:
    """What is known about one subspace's accuracy, measured on the factors as stored; rounding counts against it.

    Attributes:
        displacement_norm2: |D|_F^2.
        captured_energy: 1 - |D - U S V^T|^2 / |D|^2, at least.
        optimal_share: at least this share of what the best k directions capture is captured; 0 means nothing is known.
        residual: max over i of max(|D v - s u|, |D^T u - s v|) / s.
        orthonormality: max(|U^T U - I|_F, |V^T V - I|_F).
        next_value: upper estimate of the next singular value.
        standing_out: how many leading directions a gap separates from what follows. Inside the bulk that follows,
            any directions are as good as others that capture as much.
        subspace_error: bound on the share that is missed of the true left or right subspace of those that stand out;
            1 means nothing is known.
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
    optimal_share: float = 0.0  # absent from a subspace file before it was known
    standing_out: int = 0

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
