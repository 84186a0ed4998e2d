"""The compiled core (cpp/bindings/module.cpp); the C++ headers in cpp/include/csulora document it in full.

No module has this name: `csulora.native` loads ``_core_2_13``, ``_core_2_14`` and so on, and they all look like this.
"""

from collections.abc import Sequence
from typing import overload

import torch

TORCH_VERSION: str
CUDA: bool

class Certificate:
    """What is known about a subspace's accuracy."""

    displacement_norm2: float
    captured_energy: float
    optimal_share: float
    residual: float
    orthonormality: float
    next_value: float
    standing_out: int
    subspace_error: float
    noise_edge: float
    above_noise: int
    passes: int
    def __init__(self) -> None: ...

class Subspace:
    """Leading singular triples of one displacement: u (m, k), s (k) float32, v (n, k)."""

    def __init__(self, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> None: ...
    @property
    def u(self) -> torch.Tensor: ...
    @property
    def s(self) -> torch.Tensor: ...
    @property
    def v(self) -> torch.Tensor: ...
    @property
    def certificate(self) -> Certificate: ...

class ExtractOptions:
    """How the leading singular subspace is computed."""

    rank: int
    energy: float | None
    above_bulk: bool
    tolerance: float
    energy_tolerance: float
    keep_noise: bool
    noise_std: float | None
    factor_dtype: torch.dtype
    seed: int
    def __init__(self) -> None: ...

class Workspace:
    """Memory that one extraction leaves to the next; for one call at a time."""

    def __init__(self) -> None: ...

@overload
def extract_subspace(
    base: torch.Tensor, aligned: torch.Tensor, options: ExtractOptions = ..., workspace: Workspace | None = None
) -> Subspace: ...
@overload
def extract_subspace(task: ExtractTask, options: ExtractOptions = ..., workspace: Workspace | None = None) -> Subspace:
    """Extract from a task, whose matrices are None as soon as their difference is formed."""

class ExtractTask:
    """A displacement: base and aligned (m, n), what messages call it, and its own ``noise_std``."""

    def __init__(
        self,
        base: torch.Tensor,
        aligned: torch.Tensor,
        label: str = "displacement",
        noise_std: float | None = None,
    ) -> None: ...
    @property
    def base(self) -> torch.Tensor: ...
    @property
    def aligned(self) -> torch.Tensor: ...
    @property
    def label(self) -> str: ...
    @property
    def noise_std(self) -> float | None: ...

def extract_subspaces(tasks: Sequence[ExtractTask], options: ExtractOptions = ...) -> list[Subspace]: ...
@overload
def validate(subspace: Subspace) -> None: ...
@overload
def validate(subspaces: Sequence[tuple[str, Subspace]]) -> None: ...
def certify(
    base: torch.Tensor,
    aligned: torch.Tensor,
    subspace: Subspace,
    options: ExtractOptions = ...,
    standing_out: int | None = None,
) -> Certificate: ...

class LoraFactors:
    """The factors of dW = scale * b a: b (m, r), a (r, n)."""

    def __init__(self, b: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> None: ...
    @property
    def b(self) -> torch.Tensor: ...
    @property
    def a(self) -> torch.Tensor: ...
    @property
    def scale(self) -> float: ...

class Components:
    """One number per component of an update; as an attenuation: the four gains, in [0, 1]."""

    def __init__(self, aligned: float, left: float, right: float, off: float) -> None: ...
    @property
    def aligned(self) -> float: ...
    @property
    def left(self) -> float: ...
    @property
    def right(self) -> float: ...
    @property
    def off(self) -> float: ...

class Penalties:
    """Penalties of the closed form, 0 or more, infinity allowed."""

    def __init__(self, aligned: float, partial: float, off: float) -> None: ...
    @property
    def aligned(self) -> float: ...
    @property
    def partial(self) -> float: ...
    @property
    def off(self) -> float: ...

class Directions:
    """Gains along the leading singular directions, and multiples of the displacement's triples that are added."""

    def __init__(self, left: Sequence[float], right: Sequence[float], reinforced: Sequence[float] = ...) -> None: ...
    @property
    def left(self) -> list[float]: ...
    @property
    def right(self) -> list[float]: ...
    @property
    def reinforced(self) -> list[float]: ...

class RankRule:
    """Which rank corrected factors have."""

    keep: RankRule
    exact: RankRule
    fixed: RankRule

class CorrectionOptions:
    """Rank rule, the rank for `RankRule.fixed`, and the relative energy with which gains of directions hold."""

    def __init__(self, rule: RankRule = ..., rank: int = 0, reference_energy: float | None = None) -> None: ...
    @property
    def rule(self) -> RankRule: ...
    @property
    def rank(self) -> int: ...
    @property
    def reference_energy(self) -> float | None: ...

class InputFilter:
    """The inputs of a module on which a correction acts, F = p q^T; p and q are (n, f) float32."""

    def __init__(self, p: torch.Tensor, q: torch.Tensor) -> None: ...
    @property
    def p(self) -> torch.Tensor: ...
    @property
    def q(self) -> torch.Tensor: ...

class CorrectionTask:
    """One module of an adapter with everything its correction needs; an input filter goes with `Directions` alone."""

    def __init__(
        self,
        factors: LoraFactors,
        subspace: Subspace,
        attenuation: Penalties | Components | Directions,
        label: str = "update",
        input_filter: InputFilter | None = None,
    ) -> None: ...
    @property
    def factors(self) -> LoraFactors: ...
    @property
    def subspace(self) -> Subspace: ...
    @property
    def attenuation(self) -> Penalties | Components | Directions: ...
    @property
    def label(self) -> str: ...
    @property
    def input_filter(self) -> InputFilter | None: ...

class Correction:
    """A corrected update with scale 1, of the dtypes of the one it replaces, and what was measured on the way."""

    def __init__(
        self,
        factors: LoraFactors,
        energies: Components,
        gains: Components,
        norm: float,
        relative_change: float,
        undo: float,
        undo_after: float,
        truncation_error: float,
    ) -> None: ...
    @property
    def factors(self) -> LoraFactors: ...
    @property
    def energies(self) -> Components: ...
    @property
    def gains(self) -> Components: ...
    @property
    def norm(self) -> float: ...
    @property
    def relative_change(self) -> float: ...
    @property
    def undo(self) -> float: ...
    @property
    def undo_after(self) -> float: ...
    @property
    def truncation_error(self) -> float: ...

def correct(tasks: Sequence[CorrectionTask], options: CorrectionOptions = ...) -> list[Correction]: ...
def energy_along(tasks: Sequence[CorrectionTask], directions: int) -> float:
    """An adapter's relative energy along its modules' leading directions, see `Policy.reference_energy`."""

def penalty_scale(energy: float, reference_energy: float) -> float:
    """By what an adapter's penalties are multiplied, see `Policy.reference_energy`."""

def norm(factors: LoraFactors) -> float:
    """|dW|_F of an update, in float64; not finite where the factors are not."""

class AnnihilationTask:
    def __init__(self, factors: LoraFactors, weight: torch.Tensor, label: str = "update") -> None: ...

class Annihilation:
    @property
    def ratio(self) -> float: ...
    @property
    def rank(self) -> int: ...

def annihilations(tasks: Sequence[AnnihilationTask]) -> list[Annihilation]:
    """Annihilation ratios and the ranks of updates, see `csulora.correction.annihilation`."""

def sketches(matrices: Sequence[torch.Tensor], columns: int, seed: int, dtype: torch.dtype = ...) -> list[torch.Tensor]:
    """M G / sqrt(columns) of each matrix M (m, n), float32 or float64, for Gaussian numbers G of a seed."""
