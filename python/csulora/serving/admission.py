"""What the guard of a server's front end decides, and what it lets the server's other processes load."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from csulora.adapters.expert_encoding import Layout, has_experts
from csulora.adapters.experts import decoded
from csulora.adapters.lora import Adapter, LoraModule, has_same_bits, is_finite
from csulora.correction.correct import cover
from csulora.errors import CsuloraError, HostLimitError, InputError, RefusedError, printable
from csulora.serving.decisions import Form
from csulora.serving.gate import Gate
from csulora.serving.publication import PREFIX, Publication, is_complete
from csulora.serving.signatures import SIGNATURE_SUFFIX


@dataclass(frozen=True)
class Terms:
    """As what a server takes adapters.

    Attributes:
        dtype: the type in which the host holds them.
        max_rank: the largest rank that it takes.
        layout: asks the served model in which layout it reads updates of experts; None: in that of the adapter.
        fit: gives a corrected adapter the form that the host reads rightly, or refuses it.
    """

    dtype: torch.dtype
    max_rank: int
    layout: Callable[[], Layout] | None = None
    fit: Callable[[Adapter], Adapter] | None = None


_READ = (".json", ".safetensors", SIGNATURE_SUFFIX)

_Signature = tuple[tuple[str, int, int, int, int], ...]


class Admission:
    """Decides on adapters and publishes the corrected ones; the one of a front end decides for all its workers.

    The front end asks `admit`, and passes on the directory that it returns in place of the adapter's path. Workers
    load such directories and nothing else (`check_published`), so that all of them load the same bytes, whatever
    becomes of the original, and what the host evicts and loads again is the same adapter. A directory is named after
    what it was made of and never changes, so that cached prefixes, which a host may keep by path, stay true too.
    """

    def __init__(self, gate: Gate) -> None:
        """Start with nothing decided; ``gate`` decides and records."""
        self.gate = gate
        self._publication = Publication()
        self._admitted: dict[Hashable, Path] = {}
        self._outcomes: dict[tuple[str, torch.dtype], tuple[_Signature, Path | CsuloraError]] = {}
        self._ranks: dict[Path, int] = {}
        self._published: dict[Path, tuple[Mapping[str, str], Form]] = {}  # outputs, see `Decision`
        self._judging: dict[tuple[str, torch.dtype], threading.Lock] = {}

    def is_published(self, path: Path) -> bool:
        """Whether a path is one that `admit` returned, or could have."""
        return self._publication.holds(path)

    def admit(self, identity: Hashable, locate: Callable[[], Path], terms: Terms, reload: bool) -> Path:
        """Return a directory with the corrected adapter, rounded once to the host's type.

        For an adapter that was admitted before this takes no lock and reads nothing. The files of others are read
        only if they changed since they were last decided on.

        Args:
            identity: what the host knows the adapter by.
            locate: finds out where it lies; the host may have to download it.
            terms: as what the server takes adapters.
            reload: decide on the files as they are now, though the adapter was admitted before.

        Raises:
            CsuloraError: why the adapter is not let through.
        """
        admitted = self._admitted.get(identity)
        if admitted is not None and not reload and is_complete(admitted):
            return admitted
        path = locate()
        with self._judging.setdefault((str(path), terms.dtype), threading.Lock()):
            directory = self._judge(path, terms)
        if self._ranks[directory] > terms.max_rank:
            raise HostLimitError(
                f"{path}: has rank {self._ranks[directory]} after correction, and the server takes {terms.max_rank}; "
                "raise --max-lora-rank, or set the policy's rank"
            )
        if admitted not in (None, directory) and not reload:
            raise RefusedError(
                f"{path}: changed since it was loaded, and {admitted}, which was made of it then, is gone; "
                f"load it again, and keep what cleans up temporary files away from {PREFIX}*"
            )
        self._admitted[identity] = directory
        return directory

    def _judge(self, path: Path, terms: Terms) -> Path:
        signature, dtype = _signature(path), terms.dtype
        decided_on, outcome = self._outcomes.get((str(path), dtype), (None, None))
        if decided_on == signature:
            if isinstance(outcome, CsuloraError):
                raise outcome.with_traceback(None)
            if outcome is not None and is_complete(outcome):
                return outcome
        try:
            directory = self._corrected(path, terms)
        except CsuloraError as error:
            if _follows_from_content(error):
                # Another than ``error``, whose traceback holds the upload's bytes.
                self._outcomes[str(path), dtype] = signature, type(error)(*error.args)
            raise
        self._outcomes[str(path), dtype] = signature, directory
        return directory

    def _corrected(self, path: Path, terms: Terms) -> Path:
        """Publish the corrected adapter, unless what the same files were corrected to is there already."""
        with self.gate.decision(path) as decision:
            adapter = decoded(decision.read_directory(path), self.gate.subspace.provenance.experts)
            self._check_rank(adapter, terms.max_rank)
            directory = self._publication.directory(adapter, terms.dtype)
            if directory in self._published and is_complete(directory):
                outputs, form = self._published[directory]
                decision.recall(outputs, form)
                return directory
            layout = terms.layout() if terms.layout and has_experts(adapter) else None
            corrected, _ = decision.correct(to_be_rounded_once(adapter, terms.dtype), layout)
            fitted = terms.fit(corrected) if terms.fit else corrected
            form = Form("peft", layout, _name(terms.dtype), fitted=not _is_same(fitted, corrected))
            is_logged = self.gate.log.path is not None
            outputs = self._publication.publish(cast(fitted, terms.dtype), directory, hashed=is_logged)
            decision.delivered(outputs, form)
        self._ranks[directory] = max(module.rank for module in fitted.modules.values())
        self._published[directory] = outputs, form
        return directory

    def _check_rank(self, adapter: Adapter, max_rank: int) -> None:
        """Raise `RefusedError` if it is clear before anything is computed that the rank will be too large."""
        policy = self.gate.policy
        if policy.rank == "exact":
            return
        largest = max_rank if policy.rank == "keep" else max(max_rank, policy.rank)
        too_large = {name: m for name, m in adapter.modules.items() if min(m.rank, *m.shape) > largest}
        covered = cover(adapter, self.gate.subspace, policy) if too_large else {}
        for name, module in too_large.items():
            if name in covered or policy.fate_of(name) == "keep":
                raise HostLimitError(
                    f"{adapter.path}: {name} has rank {module.rank}, and the server takes {max_rank}; "
                    "raise --max-lora-rank, or set the policy's rank"
                )


def refusal(source: object, error: Exception) -> str:
    """Return what a client is told of an adapter that is not let through: who refuses, and why."""
    if isinstance(error, CsuloraError):
        return f"csulora: {error}"
    return printable(f"csulora: {source}: could not be decided on, so it is not loaded: {error!r}")


def _follows_from_content(error: CsuloraError) -> bool:
    """Whether the same files will be refused again: neither file system nor log nor a deadline had a part in it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | subprocess.TimeoutExpired):
            return False
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, InputError | RefusedError)


def _is_same(one: Adapter, other: Adapter) -> bool:
    """Whether both hold the same modules, bit by bit."""
    return one is other or (
        one.modules.keys() == other.modules.keys()
        and all(
            has_same_bits(module.a, other.modules[name].a) and has_same_bits(module.b, other.modules[name].b)
            for name, module in one.modules.items()
        )
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_be_rounded_once(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return an adapter whose corrected form is rounded to the host's ``dtype`` alone.

    A correction rounds to the storage types. If they are the host's, the adapter stays as it is, else it is in float32.
    """
    return adapter if _is_stored_as(adapter, dtype) else cast(adapter, torch.float32)


def _is_stored_as(adapter: Adapter, dtype: torch.dtype) -> bool:
    return all(module.a.dtype == module.b.dtype == dtype for module in adapter.modules.values())


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Round the factors to ``dtype``; one infinity would turn the answers to everybody into NaN.

    Factors that have that type stay as they are: neither a reader nor a correction lets infinity through.

    Raises:
        RefusedError: a factor does not fit.
    """
    if _is_stored_as(adapter, dtype):
        return adapter
    modules = {
        name: LoraModule(module.b.to(dtype), module.a.to(dtype), module.scale, module.is_embedding)
        for name, module in adapter.modules.items()
    }
    for name, module in modules.items():
        if not (is_finite(module.a) and is_finite(module.b)):
            raise HostLimitError(
                f"{adapter.path}: {name} is too large for {dtype}, in which the server holds adapters; "
                "scale the adapter down, or serve with a dtype of a larger range"
            )
    return replace(adapter, modules=modules)


def _signature(path: Path) -> _Signature:
    """Identity and times of the files of an adapter; empty if there are none."""
    try:
        with os.scandir(path) as entries:
            states = {entry.name: entry.stat() for entry in entries if entry.name.endswith(_READ)}
    except OSError:
        return ()
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in sorted(states.items()))
