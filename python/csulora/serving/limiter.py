"""How many adapters are corrected at a time in one process: as many as there are cores.

A correction is half Python, which one thread at a time may run. Sixteen threads at once spend their time handing that
right to one another: together they are hardly faster than one, where two are nearly twice as fast.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_WAIT = 5.0  # seconds; a thread that hangs in a file system must not hold up all others

_limiter: threading.Semaphore


def _set_up() -> None:
    global _limiter
    _limiter = threading.Semaphore(len(os.sched_getaffinity(0)))


_set_up()
os.register_at_fork(after_in_child=_set_up)  # the threads that were let through are not in the child


@contextmanager
def limited() -> Iterator[None]:
    """Run the block on one of as many threads as there are cores; wait for that, though not for ever."""
    limiter = _limiter
    acquired = limiter.acquire(timeout=_LONGEST_WAIT)
    try:
        yield
    finally:
        if acquired:
            limiter.release()
