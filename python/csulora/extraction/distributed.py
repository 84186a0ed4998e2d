"""Processes that share the work of one command, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from csulora.device import assign_gpu
from csulora.errors import CsuloraError

T = TypeVar("T")

# The others start at the same time. If torchrun was killed meanwhile, nobody ever answers.
_PATIENCE_TO_JOIN = timedelta(minutes=10)
# A process may have hours of work when another is done. Of one that dies, torchrun and the closed connections tell.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; alone unless `joined` says otherwise.

    Whatever waits raises `CsuloraError` if another process ends early.
    """

    index: int = 0
    count: int = 1

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this one does what must be done once."""
        return self.index == 0

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """Return this process's share of the work, in the order of ``costs``, which every process must give alike.

        The dearest first, each goes to the process that has least to do.
        """
        loads = [0.0] * self.count
        mine = set()
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            least = loads.index(min(loads))
            loads[least] += costs[name]
            if least == self.index:
                mine.add(name)
        return [name for name in costs if name in mine]

    def from_first(self, value: T) -> T:
        """Return the first process's ``value`` on every process."""
        values = [value]
        if not self.is_alone:
            with _partners():
                dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Return when all processes have come here."""
        if not self.is_alone:
            with _partners():
                dist.barrier()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes that torchrun started, if it started this one, each with a GPU where there are some."""
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Processes()
        return
    assign_gpu(int(os.environ["LOCAL_RANK"]))
    with _partners():
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE_TO_JOIN))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _partners() -> Iterator[None]:
    """Turn what torch.distributed raises into an error of csulora's."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise CsuloraError(
            f"another process, or torchrun, of this run ended early ({reason}); see its own message; "
            "finished modules are kept; run the same command to continue"
        ) from error
