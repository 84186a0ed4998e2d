"""Checks a subspace file against the checkpoints it claims to come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from csulora.errors import InputError, check_type
from csulora.extraction.model_pair import LoadedModule, ModelPair, Progress
from csulora.native import _core
from csulora.subspace.certificate import Certificate
from csulora.subspace.subspace import Subspace

# Float64 measurements of the same float32 matrix: another number of threads sums in another order.
_MARGIN = 1e-6
# Both next values are estimated from random start blocks, and where the gap to s_k is narrow, `subspace_error`
# magnifies the small difference between them.
_NEXT_VALUE_FACTOR = 1.1
_SUBSPACE_ERROR_FACTOR = 10
_OPTIMAL_SHARE_MARGIN = 0.005
_SKETCH_MARGIN = 0.01  # bfloat16 rounds to 0.004
# No extraction takes so large a seed: the start block is never the one that the subspace file was made with.
_SEED = 1 << 63


@dataclass(frozen=True)
class Verification:
    """One module's stored certificate beside a freshly measured one."""

    module: str
    stored: Certificate
    measured: Certificate
    same_weights: bool
    same_sketch: bool = True

    @property
    def holds(self) -> bool:
        """Whether the weights are the subspace file's and the stored certificate claims nothing better than was
        measured.

        The angle is measured for as many directions as it is stored for, so that ``standing_out`` is not compared.
        ``above_noise`` and ``passes`` describe the run that made the subspace file, so there is nothing to compare.
        """
        stored, measured = self.stored, self.measured
        return (
            self.same_weights
            and self.same_sketch
            and measured.captured_energy >= stored.captured_energy - _MARGIN
            and measured.optimal_share >= stored.optimal_share - _OPTIMAL_SHARE_MARGIN
            and measured.residual <= stored.residual + _MARGIN
            and measured.orthonormality <= stored.orthonormality + _MARGIN
            and measured.next_value <= stored.next_value * _NEXT_VALUE_FACTOR
            and measured.subspace_error <= stored.subspace_error * _SUBSPACE_ERROR_FACTOR + _MARGIN
            and math.isclose(measured.displacement_norm2, stored.displacement_norm2, rel_tol=_MARGIN)
            and math.isclose(measured.noise_edge, stored.noise_edge, rel_tol=_MARGIN)
        )


def verify(
    subspace: Subspace, base: str | Path, aligned: str | Path, progress: Progress | None = None
) -> list[Verification]:
    """Recompute every certificate of a subspace file from the two checkpoints, with another random start block.

    Raises:
        InputError: a checkpoint does not have the subspace file's modules in its shapes, or values are not usable.

    >>> found = csulora.extract(base, aligned, rank=4, modules=["*.q_proj"])
    >>> all(result.holds for result in csulora.verify(found, base, aligned))
    True
    """
    check_type(subspace, Subspace, "subspace")
    if subspace.provenance.canary is not None:
        raise InputError(
            f"{subspace.path or 'the subspace'}: is a canary, and the copy that it was extracted from was never "
            "written; make it again with `csulora canary` and the same seed, and compare sha256"
        )
    model_pair = ModelPair.open(base, aligned, modules=list(subspace))
    for name, module in subspace.items():
        if (shape := model_pair.aligned.weights[name].shape) != module.shape:
            raise InputError(
                f"{model_pair.aligned.name}: tensor {name}.weight is {list(shape)}, but the subspace file is for "
                f"{list(module.shape)}; it is of another model"
            )
    options = _core.ExtractOptions()
    options.seed = _SEED
    results = []
    for loaded in chain.from_iterable(model_pair.load_ahead(model_pair.modules, progress)):
        stored, (factors,) = subspace[loaded.name], subspace.to_core([loaded.name])
        options.noise_std = loaded.task.noise_std
        # Of further rows nothing is known. Columns that need them are not orthonormal without them.
        common = _core.Subspace(factors.u[: len(loaded.task.base)], factors.s, factors.v)
        try:
            standing_out = stored.certificate.standing_out or None
            measured = _core.certify(loaded.task.base, loaded.task.aligned, common, options, standing_out)
        except InputError as error:
            raise InputError(f"{loaded.name}: {error}") from error
        same = (loaded.base_sha256, loaded.aligned_sha256) == (stored.base_sha256, stored.aligned_sha256)
        results.append(
            Verification(
                loaded.name, stored.certificate, Certificate.from_core(measured), same, _same_sketch(subspace, loaded)
            )
        )
    return results


def _same_sketch(subspace: Subspace, loaded: LoadedModule) -> bool:
    """Whether a module's sketch, if it has one, is that of the aligned matrix, to its storage type's rounding."""
    stored = subspace[loaded.name].sketch
    if stored is None:
        return True
    (sketch,) = _core.sketches([loaded.task.aligned], stored.shape[1], subspace.provenance.options["seed"])
    difference = (stored.float() - sketch).norm() if stored.shape == sketch.shape else math.inf
    return bool(difference <= _SKETCH_MARGIN * sketch.norm())
