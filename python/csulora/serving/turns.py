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

_turns: threading.Semaphore


def _set_up() -> None:
    global _turns
    _turns = threading.Semaphore(len(os.sched_getaffinity(0)))


_set_up()
os.register_at_fork(after_in_child=_set_up)  # the threads that had a turn are not in the child


@contextmanager
def turn() -> Iterator[None]:
    """Wait for one of as many turns as there are cores, though not for ever, and have it during the block."""
    turns = _turns
    has_turn = turns.acquire(timeout=_LONGEST_WAIT)
    try:
        yield
    finally:
        if has_turn:
            turns.release()
