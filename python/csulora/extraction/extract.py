"""From two checkpoints to a subspace pack, one matrix of each at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from csulora import __version__
from csulora.device import resolve
from csulora.errors import InputError, RefusedError
from csulora.extraction.pair import CheckpointPair, LoadedModule, Progress
from csulora.extraction.parts import Parts
from csulora.extraction.ranks import Ranks
from csulora.io.files import check_not_input, identity_of_file
from csulora.models.checkpoint import Checkpoint
from csulora.native import _core
from csulora.subspace.subspace import FACTOR_DTYPES, Certificate, ModuleSubspace, Provenance, Subspace

_LARGEST_RANK = 1 << 20


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
        """Check every field."""
        for name in ("rank", "max_rank"):
            if not 1 <= getattr(self, name) <= _LARGEST_RANK:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie between 1 and {_LARGEST_RANK}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy is {self.energy}; it must be more than 0 and at most 1")
        if self.dtype not in FACTOR_DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; it must be one of {', '.join(FACTOR_DTYPES)}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must be 0 or more and less than 2^63")

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
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
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
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU if one can be used.
        ranks: the processes that share the modules; each calls this alike, with an ``output`` that all of them see.
            The pack is the one that a single process makes with as many threads as each of them has.

    Raises:
        CsuloraError: another rank ended early. What is finished is kept then, as after an interruption.
        InputError: the checkpoints do not fit each other, or an option is out of range.
        RefusedError: nothing in the pair stands out of storage rounding.
    """
    place = resolve(device)
    if isinstance(modules, str):
        raise InputError(f"modules is the text {modules!r}; give a list of globs")
    options = ExtractionOptions(rank, energy, max_rank, tuple(modules), dtype, seed, keep_noise)
    pair = CheckpointPair.open(base, aligned, patterns=options.modules)
    workspace = _core.Workspace()
    if output is None:
        if not ranks.is_alone:
            raise InputError("ranks share their work through files; name an output")
        extracted = {
            loaded.name: _extract_module(loaded, options, place, workspace)
            for loaded in pair.load_ahead(pair.modules, progress)
        }
        return _pack(pair, options, extracted)
    output = Path(output)
    check_not_input(output, [base, aligned, *pair.base.files, *pair.aligned.files])
    with _open_parts(pair, _settings(options, place), output, ranks) as parts:
        try:
            for loaded in pair.load_ahead(_share(pair, parts, ranks), progress):
                parts.save(loaded.name, _extract_module(loaded, options, place, workspace))
            ranks.wait()
            if ranks.is_first:
                _pack(pair, options, {module: parts.load(module) for module in pair.modules}).save(output)
        except (InputError, RefusedError):  # what is wrong with the input stays wrong: there is nothing to continue
            if ranks.is_alone:  # others may still be writing
                parts.remove()
            raise
        ranks.wait()
        if ranks.is_first:
            parts.remove()
    return Subspace.open(output)


def _open_parts(pair: CheckpointPair, settings: dict[str, Any], output: Path, ranks: Ranks) -> Parts:
    """Open the parts on the first rank and then, where the same is to be computed, on the others."""
    parts = Parts(output, settings | _files(pair)) if ranks.is_first else None
    expected = ranks.from_first(settings)
    if settings != expected:
        differing = next(key for key in settings if settings[key] != expected[key])
        raise InputError(
            f"{differing} is {settings[differing]} on rank {ranks.rank} and {expected[differing]} on the first; "
            "all ranks must compute alike"
        )
    return parts or Parts.of_first_rank(output)


def _share(pair: CheckpointPair, parts: Parts, ranks: Ranks) -> list[str]:
    """Return the modules that this rank has left to extract."""
    missing = ranks.from_first([module for module in pair.modules if not parts.finished(module)])
    return ranks.share({module: pair.entries(module) for module in missing})


def _pack(pair: CheckpointPair, options: ExtractionOptions, extracted: dict[str, ModuleSubspace]) -> Subspace:
    """Put a pack together; raises `RefusedError` if nothing stands out in any module."""
    _check_signal(pair, extracted)
    aliases = {alias: module for alias, module in pair.aligned.aliases.items() if module in extracted}
    provenance = Provenance(__version__, pair.base.name, pair.aligned.name, options.to_dict(), aliases)
    return Subspace(extracted, provenance)


def _extract_module(
    loaded: LoadedModule, options: ExtractionOptions, device: torch.device, workspace: _core.Workspace
) -> ModuleSubspace:
    try:
        core_options = options.to_core()
        core_options.noise_std = loaded.noise_std
        base, aligned = loaded.base.to(device), loaded.aligned.to(device)
        result = _core.extract_subspace(base, aligned, core_options, workspace)
    except InputError as error:
        raise InputError(f"{loaded.name}: {error}") from error
    certificate = Certificate.from_core(result.certificate)
    u, s, v = (factor.cpu() for factor in (result.u, result.s, result.v))
    return ModuleSubspace(u, s, v, certificate, loaded.base_sha256, loaded.aligned_sha256)


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


def _settings(options: ExtractionOptions, device: torch.device) -> dict[str, Any]:
    """Describe what determines the bits of a result besides the checkpoints."""
    return {
        "csulora": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "options": options.to_dict(),
    }


def _files(pair: CheckpointPair) -> dict[str, Any]:
    """Describe the checkpoints as they are now."""

    def files(checkpoint: Checkpoint) -> dict[str, list[int]]:
        return {str(path.resolve()): list(identity_of_file(path)) for path in checkpoint.files}

    return {"base": files(pair.base), "aligned": files(pair.aligned)}
