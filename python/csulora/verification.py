"""Checks a pack against the checkpoints it claims to come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from csulora.core import _core
from csulora.pair import CheckpointPair, Progress
from csulora.subspace import Certificate, Subspace

# Float64 measurements of the same float32 matrix: another number of threads sums in another order.
_MARGIN = 1e-6
# Both next values are estimated from random start blocks; they agree within the Krylov method's tolerance for it.
_NEXT_VALUE_MARGIN = 0.1


@dataclass(frozen=True)
class Verification:
    """One module's stored certificate beside a freshly measured one."""

    module: str
    stored: Certificate
    measured: Certificate
    same_weights: bool

    @property
    def holds(self) -> bool:
        """Whether the weights are the pack's and the stored certificate claims nothing better than was measured."""
        stored, measured = self.stored, self.measured
        return (
            self.same_weights
            and measured.captured >= stored.captured - _MARGIN
            and measured.residual <= stored.residual + _MARGIN
            and measured.orthonormality <= stored.orthonormality + _MARGIN
            and measured.next_value <= stored.next_value * (1 + _NEXT_VALUE_MARGIN)
        )


def verify(
    pack: Subspace, base: str | Path, aligned: str | Path, progress: Progress | None = None
) -> list[Verification]:
    """Recompute every certificate of a pack from the two checkpoints, with another random start block.

    Raises:
        InputError: a checkpoint does not have the pack's modules in the pack's shapes.
    """
    pair = CheckpointPair.open(base, aligned, modules=list(pack))
    options = _core.ExtractOptions()
    options.seed = int(pack.provenance.get("options", {}).get("seed", 0)) + 1
    results = []
    for loaded in pair.load_ahead(pair.modules, progress):
        stored = pack[loaded.name]
        options.noise_std = loaded.noise_std
        measured = _core.certify(loaded.base, loaded.aligned, stored.to_core(), options)
        same = (loaded.base_sha256, loaded.aligned_sha256) == (stored.base_sha256, stored.aligned_sha256)
        results.append(Verification(loaded.name, stored.certificate, Certificate.from_core(measured), same))
    return results
