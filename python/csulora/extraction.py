"""From two checkpoints to a subspace pack, one matrix of each at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from csulora._version import __version__
from csulora.checkpoint import Checkpoint
from csulora.core import _core
from csulora.errors import InputError, RefusedError
from csulora.pair import CheckpointPair, LoadedModule, Progress
from csulora.parts import Parts
from csulora.subspace import FACTOR_DTYPES, Certificate, ModuleSubspace, Subspace


@dataclass(frozen=True)
class ExtractionOptions:
    """What determines a pack's content besides the two checkpoints; `extract` documents the fields."""

    rank: int = 64
    energy: float | None = None
    max_rank: int = 256
    modules: tuple[str, ...] = ()
    dtype: str = "f16"
    seed: int = 0
    keep_noise: bool = False

    def __post_init__(self) -> None:
        """Check what the compiled core cannot."""
        if self.dtype not in FACTOR_DTYPES:
            raise InputError(f"dtype {self.dtype!r}: must be one of {', '.join(FACTOR_DTYPES)}")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: must not be negative")

    def to_core(self) -> _core.ExtractOptions:
        """Return the options as the compiled core takes them."""
        options = _core.ExtractOptions()
        options.rank = self.rank if self.energy is None else self.max_rank
        options.energy = self.energy
        options.keep_noise = self.keep_noise
        options.factor_dtype = FACTOR_DTYPES[self.dtype]
        options.seed = self.seed
        return options

    def to_dict(self) -> dict[str, Any]:
        """Return the options for JSON."""
        return asdict(self) | {"modules": list(self.modules)}


def extract(
    base: str | Path,
    aligned: str | Path,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    rank: int = 64,
    energy: float | None = None,
    max_rank: int = 256,
    modules: Sequence[str] = (),
    dtype: str = "f16",
    seed: int = 0,
    keep_noise: bool = False,
    device: str = "auto",
) -> Subspace:
    """Estimate the subspace in which alignment moved each weight matrix.

    Args:
        base: checkpoint before alignment, a directory or a hub id.
        aligned: checkpoint after alignment.
        output: pack file to write. Finished modules are kept beside it until it is complete, so that an
            interrupted run continues where it was.
        progress: called before each module and at the end.
        rank: directions per module, unless ``energy`` is given.
        energy: keep the fewest directions that capture this share of a displacement's energy, in (0, 1].
        max_rank: the most directions per module if ``energy`` is given.
        modules: globs over module names; none means every 2-D weight of attention and MLP.
        dtype: storage type of the factors: ``f16``, ``bf16`` or ``f32``.
        seed: seed of the random start block.
        keep_noise: keep directions below the storage rounding of the checkpoints.
        device: ``cpu``, or ``auto`` for the best this build can use.

    Raises:
        InputError: the checkpoints do not fit each other, or an option is out of range.
        RefusedError: nothing in the pair stands out of storage rounding.
    """
    if device not in ("auto", "cpu"):
        raise InputError(f"device {device!r}: this build computes on the CPU; use auto or cpu")
    options = ExtractionOptions(rank, energy, max_rank, tuple(modules), dtype, seed, keep_noise)
    pair = CheckpointPair.open(base, aligned, patterns=options.modules)
    parts = Parts(Path(output), _identity(pair, options)) if output else None
    extracted = dict(_extract_modules(pair, options, parts, progress))
    if not keep_noise:
        _check_signal(pair, extracted)
    provenance = {
        "csulora": __version__,
        "base": pair.base.name,
        "aligned": pair.aligned.name,
        "options": options.to_dict(),
        "aliases": {alias: module for alias, module in pair.aligned.aliases.items() if module in extracted},
    }
    pack = Subspace(extracted, provenance)
    if output and parts:
        pack.save(output)
        parts.remove()
    return pack


def _extract_modules(
    pair: CheckpointPair, options: ExtractionOptions, parts: Parts | None, progress: Progress | None
) -> Iterator[tuple[str, ModuleSubspace]]:
    missing = [module for module in pair.modules if not (parts and parts.finished(module))]
    for loaded in pair.load_ahead(missing, progress):
        module = _extract_module(loaded, options)
        if parts:
            parts.save(loaded.name, module)
        else:
            yield loaded.name, module
    if parts:
        yield from ((module, parts.load(module)) for module in pair.modules)


def _extract_module(loaded: LoadedModule, options: ExtractionOptions) -> ModuleSubspace:
    try:
        core_options = options.to_core()
        core_options.noise_std = loaded.noise_std
        result = _core.extract_subspace(loaded.base, loaded.aligned, core_options)
    except InputError as error:
        raise InputError(f"{loaded.name}: {error}") from error
    certificate = Certificate.from_core(result.certificate)
    return ModuleSubspace(result.u, result.s, result.v, certificate, loaded.base_sha256, loaded.aligned_sha256)


def _check_signal(pair: CheckpointPair, modules: dict[str, ModuleSubspace]) -> None:
    """Raise `RefusedError` if no displacement has a direction that is kept."""
    if any(module.rank for module in modules.values()):
        return
    names = f"{pair.base.name} and {pair.aligned.name}"
    if all(module.certificate.displacement_norm2 == 0 for module in modules.values()):
        raise RefusedError(f"{names} do not differ in any selected matrix; is this the right pair?")
    raise RefusedError(
        f"{names} differ by no more than storage rounding: no singular value of any of {len(modules)} "
        "displacements lies above its noise edge; use less rounded checkpoints"
    )


def _identity(pair: CheckpointPair, options: ExtractionOptions) -> dict[str, Any]:
    """Describe what a run must have in common with an interrupted one to continue it."""

    def files(checkpoint: Checkpoint) -> dict[str, list[int]]:
        stats = {file: file.stat() for file in sorted({weight.file for weight in checkpoint.weights.values()})}
        return {file.name: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}

    return {
        "csulora": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "options": options.to_dict(),
        "base": files(pair.base),
        "aligned": files(pair.aligned),
    }
