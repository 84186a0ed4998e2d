"""From two checkpoints to a subspace file, one matrix of each at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from csulora import __version__
from csulora.device import resolve
from csulora.errors import InputError, RefusedError
from csulora.extraction.distributed import Processes
from csulora.extraction.model_pair import LoadedModule, ModelPair, Progress
from csulora.extraction.partial_run import PartialRun
from csulora.extraction.vocabulary import stored_vocabulary
from csulora.io.files import check_not_inputs, identity_of_file
from csulora.models.checkpoint import Checkpoint
from csulora.models.names import is_expert
from csulora.native import _core
from csulora.subspace.certificate import Certificate
from csulora.subspace.module_subspace import FACTOR_DTYPES, ModuleSubspace
from csulora.subspace.provenance import Provenance
from csulora.subspace.subspace import Subspace

Rank = int | Literal["auto"]
_LARGEST_RANK = 1 << 20
_WIDEST_SKETCH = 4096
_MOST_BY_ENERGY, _MOST_BY_BULK = 256, 64  # directions, where nobody says how many


@dataclass(frozen=True)
class ExtractionOptions:
    """What determines a subspace file's content besides the two checkpoints; `extract` documents the fields."""

    rank: Rank = 64
    energy: float | None = None
    max_rank: int = 256
    modules: tuple[str, ...] = ()
    dtype: str = "f16"
    seed: int = 0
    keep_noise: bool = False
    expert_rank: int = 16
    sketch: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        ranks = {"max_rank": self.max_rank, "expert_rank": self.expert_rank}
        if self.rank != "auto":
            ranks["rank"] = self.rank
        elif self.energy is not None:
            raise InputError("rank is 'auto' and energy is given; give one of them")
        for name, rank in ranks.items():
            if not (isinstance(rank, int) and 1 <= rank <= _LARGEST_RANK):
                raise InputError(f"{name} is {rank!r}; it must lie between 1 and {_LARGEST_RANK}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy is {self.energy}; it must be more than 0 and at most 1")
        if self.dtype not in FACTOR_DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; it must be one of {', '.join(FACTOR_DTYPES)}")
        if not (isinstance(self.sketch, int) and 0 <= self.sketch <= _WIDEST_SKETCH):
            raise InputError(f"sketch is {self.sketch!r}; it must lie between 0 and {_WIDEST_SKETCH}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must be 0 or more and less than 2^63")

    def to_core(self, module: str) -> _core.ExtractOptions:
        """Return the options for a module as the compiled core takes them."""
        options = _core.ExtractOptions()
        largest = self.max_rank if self.rank == "auto" or self.energy is not None else self.rank
        options.rank = min(largest, self.expert_rank) if is_expert(module) else largest
        options.energy = self.energy
        options.above_bulk = self.rank == "auto"
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
    rank: Rank = 64,
    energy: float | None = None,
    max_rank: int | None = None,
    modules: Sequence[str] = (),
    dtype: str = "f16",
    seed: int = 0,
    keep_noise: bool = False,
    expert_rank: int = 16,
    sketch: int = 0,
    device: str = "auto",
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> Subspace:
    """Estimate the subspace in which alignment moved each weight matrix.

    Args:
        base: checkpoint before alignment, a directory or a hub id.
        aligned: checkpoint after alignment.
        output: subspace file to write. Finished modules are kept beside it until it is complete, so that an
            interrupted run continues where it was.
        progress: called before each module and at the end.
        rank: directions per module, unless ``energy`` is given; ``"auto"`` for those that stand out of storage
            rounding and of the bulk of the module's own singular values.
        energy: keep the fewest directions that capture this share of a displacement's energy, in (0, 1].
        max_rank: the most directions per module; by default 256 if ``energy`` is given, and 64 for ``"auto"``.
        modules: globs over module names; none means every 2-D weight of a linear module.
        dtype: storage type of the factors: ``f16``, ``bf16`` or ``f32``.
        seed: seed of the random start block, and of the sketches: whoever knows it can make an adapter whose estimate
            is wrong.
        keep_noise: keep directions that do not stand out of the checkpoints' storage rounding.
        expert_rank: the most directions per projection of an expert, of which there may be thousands.
        sketch: columns of a sketch of every aligned matrix, with which hooks and `correct` estimate annihilation ratios
            without the checkpoint; 128 serve ranks up to 52, and 512 up to 344. 0: none. A sketch of c columns takes as
            much of the file as c directions of u.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU if one can be used.
        processes: those that share the modules; each calls this alike, with an ``output`` that all of them see.
            The subspace file is the one that a single process makes with as many threads as each of them has.

    Raises:
        CsuloraError: another process ended early. What is finished is kept then, as after an interruption.
        InputError: the checkpoints do not fit each other, or an option is out of range.
        RefusedError: nothing in the model pair stands out of storage rounding.

    >>> found = csulora.extract(base, aligned, rank=4, modules=["*.q_proj"])
    >>> found["model.layers.0.self_attn.q_proj"].rank
    4
    """
    place = resolve(device)
    if isinstance(modules, str):
        raise InputError(f"modules is the text {modules!r}; give a list of globs")
    if max_rank is None:
        max_rank = _MOST_BY_BULK if rank == "auto" else _MOST_BY_ENERGY
    options = ExtractionOptions(rank, energy, max_rank, tuple(modules), dtype, seed, keep_noise, expert_rank, sketch)
    model_pair = ModelPair.open(base, aligned, patterns=options.modules)
    if output is None:
        if not processes.is_alone:
            raise InputError("processes share their work through files; name an output")
        return extract_pair(model_pair, options, place, progress)
    output, workspace = Path(output), _core.Workspace()
    check_not_inputs([output], [base, aligned, *model_pair.base.files, *model_pair.aligned.files])
    with _open_partial_run(model_pair, _settings(options, place), output, processes) as partial_run:
        try:
            for batch in model_pair.load_ahead(_share(model_pair, partial_run, processes), progress):
                partial_run.save(_extract_batch(batch, options, place, workspace))
            processes.wait()
            if processes.is_first:
                _assembled(model_pair, options, partial_run.load()).save(output)
        except (InputError, RefusedError):  # what is wrong with the input stays wrong: there is nothing to continue
            if processes.is_alone:  # others may still be writing
                partial_run.remove()
            raise
        processes.wait()
        if processes.is_first:
            partial_run.remove()
    return Subspace.open(output)


def extract_pair(
    model_pair: ModelPair, options: ExtractionOptions, device: torch.device, progress: Progress | None = None
) -> Subspace:
    """Return the subspaces of a model pair's modules, in memory.

    Raises:
        RefusedError: nothing in the model pair stands out of storage rounding.
    """
    workspace = _core.Workspace()
    extracted: dict[str, ModuleSubspace] = {}
    for batch in model_pair.load_ahead(model_pair.modules, progress):
        extracted |= _extract_batch(batch, options, device, workspace)
    return _assembled(model_pair, options, extracted)


def _open_partial_run(
    model_pair: ModelPair, settings: dict[str, Any], output: Path, processes: Processes
) -> PartialRun:
    """Open the partial run on the first process and then, where the same is to be computed, on the others."""
    partial_run = PartialRun.create(output, settings | _files(model_pair)) if processes.is_first else None
    expected = processes.from_first(settings)
    if settings != expected:
        differing = next(key for key in settings if settings[key] != expected[key])
        raise InputError(
            f"{differing} is {settings[differing]} on process {processes.index} and {expected[differing]} on the "
            "first; all processes must compute alike"
        )
    return partial_run or PartialRun.join(output)


def _share(model_pair: ModelPair, partial_run: PartialRun, processes: Processes) -> list[str]:
    """Return the modules that this process has left to extract."""
    missing = processes.from_first([module for module in model_pair.modules if not partial_run.finished(module)])
    return processes.share({module: model_pair.entries(module) for module in missing})


def _assembled(model_pair: ModelPair, options: ExtractionOptions, extracted: dict[str, ModuleSubspace]) -> Subspace:
    """Put a `Subspace` together; raises `RefusedError` if nothing stands out in any module."""
    _check_signal(model_pair, extracted)
    aligned = model_pair.aligned
    aliases, names = (
        {name: module for name, module in further.items() if module in extracted}
        for further in (aligned.aliases, aligned.names_in_memory)
    )
    model_type = aligned.config.get("model_type")
    provenance = Provenance(
        __version__,
        model_pair.base.name,
        aligned.name,
        options.to_dict(),
        aliases,
        names=names,
        vocabulary=stored_vocabulary(aligned),
        experts=aligned.expert_layout,
        model_type=model_type,
    )
    return Subspace(extracted, provenance)


def _extract_batch(
    batch: Sequence[LoadedModule], options: ExtractionOptions, device: torch.device, workspace: _core.Workspace
) -> dict[str, ModuleSubspace]:
    core_options = options.to_core(batch[0].name)
    sketches = _sketches(batch, options)  # first: extraction lets go of the matrices
    if is_expert(batch[0].name):
        # Also for a batch of one: bits must not depend on what else is extracted beside a module.
        results = _core.extract_subspaces([loaded.on(device) for loaded in batch], core_options)
    else:
        results = [_extract_module(loaded, core_options, device, workspace) for loaded in batch]
    extracted = {loaded.name: _module_subspace(loaded, result) for loaded, result in zip(batch, results, strict=True)}
    return extracted | {name: replace(extracted[name], sketch=sketch) for name, sketch in sketches.items()}


def _extract_module(
    loaded: LoadedModule, options: _core.ExtractOptions, device: torch.device, workspace: _core.Workspace
) -> _core.Subspace:
    return _core.extract_subspace(loaded.on(device), options, workspace)


def _module_subspace(loaded: LoadedModule, result: _core.Subspace) -> ModuleSubspace:
    certificate = Certificate.from_core(result.certificate)
    u, s, v = (factor.cpu() for factor in (result.u, result.s, result.v))
    u = torch.nn.functional.pad(u, (0, 0, 0, loaded.rows - len(u)))
    return ModuleSubspace(u, s, v, certificate, loaded.base_sha256, loaded.aligned_sha256)


def _sketches(batch: Sequence[LoadedModule], options: ExtractionOptions) -> dict[str, torch.Tensor]:
    """Return the sketches that are asked for, except where rows of the aligned matrix were left out."""
    if not options.sketch:
        return {}
    whole = [loaded.task for loaded in batch if loaded.rows == len(loaded.task.aligned)]
    sketches = _core.sketches([task.aligned for task in whole], options.sketch, options.seed)
    stored = {task.label: sketch.to(FACTOR_DTYPES[options.dtype]) for task, sketch in zip(whole, sketches, strict=True)}
    for name, sketch in stored.items():
        if not bool(sketch.isfinite().all()):
            raise InputError(f"{name}: the sketch does not fit {options.dtype}; use the dtype bf16 or f32")
    return stored


def _check_signal(model_pair: ModelPair, modules: dict[str, ModuleSubspace]) -> None:
    """Raise `RefusedError` if no displacement has a direction that is kept."""
    if any(module.rank for module in modules.values()):
        return
    names = f"{model_pair.base.name} and {model_pair.aligned.name}"
    if all(module.certificate.displacement_norm2 == 0 for module in modules.values()):
        raise RefusedError(f"{names} do not differ in any selected matrix; is this the right model pair?")
    raise RefusedError(
        f"{names} differ by no more than storage rounding: no singular value of any of {len(modules)} "
        "displacements lies far enough above its noise edge; use less rounded checkpoints"
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


def _files(model_pair: ModelPair) -> dict[str, Any]:
    """Describe the checkpoints as they are now."""

    def files(checkpoint: Checkpoint) -> dict[str, list[int]]:
        return {str(path.resolve()): list(identity_of_file(path)) for path in checkpoint.files}

    return {"base": files(model_pair.base), "aligned": files(model_pair.aligned)}
