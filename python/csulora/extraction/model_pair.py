"""Two checkpoints side by side: the matrices both have, read one batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from csulora.errors import RefusedError
from csulora.extraction.noise_edge import noise_std
from csulora.models import names
from csulora.models.checkpoint import Checkpoint, GGUFCheckpoint
from csulora.models.comparison import check_comparable, check_one_model
from csulora.models.resolver import Resolver
from csulora.native import _core

Progress = Callable[[str, int, int], None]
"""Called as ``progress(module, done, total)`` before each module, counting matrix entries, and once at the end."""


_BATCH_ENTRIES = 1 << 25  # as many as a large matrix has


@dataclass(frozen=True)
class LoadedModule:
    """One module's matrices (out, in) as the core takes them, and the sha256 of the bytes they are stored as.

    The task alone holds the matrices, so that extraction can let go of them.

    ``rows`` is how many the aligned checkpoint's matrix has. The matrices here end with the last row that both have.
    Of an embedding's or head's further rows the displacement is unknown, and the subspace file has zeros for them.
    Its ``noise_std`` is what `noise_edge` gives for dequantised matrices; None if rounding follows from the dtypes.
    """

    task: _core.ExtractTask
    base_sha256: str
    aligned_sha256: str
    rows: int

    @property
    def name(self) -> str:
        """The module's name."""
        return self.task.label

    def on(self, device: torch.device) -> _core.ExtractTask:
        """Return the task itself if its matrices lie on that device, else one with copies there."""
        task = self.task
        if task.base.device == device:
            return task
        return _core.ExtractTask(task.base.to(device), task.aligned.to(device), task.label, task.noise_std)


@dataclass(frozen=True)
class ModelPair:
    """A base and an aligned checkpoint, and the modules to compare.

    Attributes:
        base: the checkpoint before alignment.
        aligned: the one after it, whose names count.
        modules: names of the modules.
        base_names: what the base calls them: the same, up to the wrappers of a model's class.
    """

    base: Checkpoint
    aligned: Checkpoint
    modules: list[str]
    base_names: Mapping[str, str]

    @classmethod
    def open(
        cls,
        base: str | Path,
        aligned: str | Path,
        *,
        modules: Sequence[str] | None = None,
        patterns: Sequence[str] = (),
    ) -> ModelPair:
        """Open both checkpoints and check that they hold the same ``modules``, or those the patterns select.

        Raises:
            InputError: a checkpoint is not usable, or the two do not fit each other.
        """
        before, after = Checkpoint.open(base), Checkpoint.open(aligned)
        check_one_model(before, after)
        counterparts = _counterparts(before, after)
        if modules is None:
            selected = _selected(before, after, patterns, counterparts)
            modules = sorted(module for module in selected if module in counterparts or not _differ(before, after))
        base_names = {module: counterparts.get(module, module) for module in modules}
        check_comparable(before, after, base_names)
        return cls(before, after, list(modules), base_names)

    def batches(self, modules: Sequence[str]) -> list[list[str]]:
        """Group modules that are extracted together, in order: projections of experts, each other one alone."""
        found: list[list[str]] = []
        room = 0
        for module in modules:
            entries = self.entries(module)
            if names.is_expert(module) and entries <= room:
                found[-1].append(module)
            else:
                found.append([module])
                room = _BATCH_ENTRIES if names.is_expert(module) else 0
            room -= entries
        return found

    def load_ahead(self, modules: Sequence[str], progress: Progress | None) -> Iterator[list[LoadedModule]]:
        """Yield the matrices of ``modules`` in `batches`, reading and hashing the next ones in the background."""
        sizes = {module: self.entries(module) for module in self.modules}
        total = sum(sizes.values())
        done = total - sum(sizes[module] for module in modules)
        batches = self.batches(modules)
        with ThreadPoolExecutor(max_workers=1) as reader:
            pending: list[Future[list[LoadedModule]]] = [reader.submit(self._load, batch) for batch in batches[:1]]
            for following in [*batches[1:], None]:
                if not pending:
                    break
                loaded = pending.pop().result()
                if following is not None:
                    pending.append(reader.submit(self._load, following))
                if progress:
                    progress(loaded[0].name, done, total)
                done += sum(sizes[module.name] for module in loaded)
                yield loaded
                # The generator must not be what keeps a matrix mapped while the next one is waited for.
                del loaded
        if progress:
            progress("", total, total)

    def entries(self, module: str) -> int:
        """Return how many entries the module's matrix has."""
        rows, columns = self.aligned.weights[module].shape
        return rows * columns

    def _load(self, batch: Sequence[str]) -> list[LoadedModule]:
        return [self._load_one(module) for module in batch]

    def _load_one(self, module: str) -> LoadedModule:
        base, base_sha256 = self.base.load(self.base_names[module])
        aligned, aligned_sha256 = self.aligned.load(module)
        quantised = [
            self.base.rounding_variances(self.base_names[module]),
            self.aligned.rounding_variances(module),
        ]
        rows, common = len(aligned), min(len(base), len(aligned))
        base, aligned = base[:common], aligned[:common]
        std = noise_std((base, aligned), quantised)
        return LoadedModule(_core.ExtractTask(base, aligned, module, std), base_sha256, aligned_sha256, rows)


def _selected(
    base: Checkpoint, aligned: Checkpoint, patterns: Sequence[str], counterparts: Mapping[str, str]
) -> set[str]:
    """Return what the patterns select in either checkpoint, in the aligned one's names.

    One may tie its head to its embedding where the other does not. The aligned checkpoint then decides which is meant:
    a head of the base without a head there is left out, and so is an embedding that only the base calls a head.
    """
    theirs = {name: module for module, name in counterparts.items()}
    here = set(aligned.select(patterns))
    there = {name: theirs.get(name, name) for name in base.select(patterns)}
    heads = {names.bare(alias) for alias in aligned.aliases}
    tied = set(base.aliases.values())
    for name, module in list(there.items()):
        if names.bare(name) in heads or (name in tied and module not in here):
            del there[name]
    return here | set(there.values())


def _counterparts(base: Checkpoint, aligned: Checkpoint) -> dict[str, str]:
    """Return what the base calls the aligned checkpoint's modules, where that is one name for one module.

    The head of a base that ties it is the embedding, which then counts for two modules.
    """
    resolver = Resolver(base.weights, base.aliases, base.names_in_memory)
    in_memory = {module: name for name, module in aligned.names_in_memory.items()}
    found: dict[str, list[str]] = {}
    tied: dict[str, str] = {}
    for module in aligned.weights:
        with suppress(RefusedError):  # several may be meant, so that none is
            resolved = resolver.resolve(module) or resolver.resolve(in_memory.get(module, module))
            if resolved is not None and resolved.is_alias:
                tied[module] = resolved.module
            elif resolved is not None:
                found.setdefault(resolved.module, []).append(module)
    exact = {name: [name] if name in modules else modules for name, modules in found.items()}
    return tied | {modules[0]: name for name, modules in exact.items() if len(modules) == 1}


def _differ(base: Checkpoint, aligned: Checkpoint) -> bool:
    """Whether one of the two may have towers that the other lacks, which no GGUF file of a language model has."""
    if isinstance(base, GGUFCheckpoint) != isinstance(aligned, GGUFCheckpoint):
        return True
    return base.config.get("model_type") != aligned.config.get("model_type")
