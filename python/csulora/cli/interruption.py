"""Ctrl-C ends a run within a second, also while the compiled core computes and no Python code runs."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import NoReturn

from csulora.cli import exit_codes

_GRACE = 0.5  # seconds in which the main thread may leave by itself, and clean up


@contextmanager
def interruptible(reason: str) -> Iterator[None]:
    """Let SIGINT end the process with exit code 130, and with ``reason`` on stderr; for the main thread.

    What is written meanwhile is complete or absent, as after any other end.
    """
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    # Filled by the signal handler itself, at once; Python's own handler runs when the core returns.
    previous = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    Thread(target=_watch, args=(received, reason), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        _report(reason)
        sys.exit(exit_codes.INTERRUPTED)
    finally:
        signal.set_wakeup_fd(previous)
        os.close(wakeup)  # ends the watching thread


def _watch(received: int, reason: str) -> None:
    with open(received, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] == signal.SIGINT and not select.select([signals], [], [], _GRACE)[0]:
                _leave(reason)


def _leave(reason: str) -> NoReturn:
    _report(reason)
    os._exit(exit_codes.INTERRUPTED)


def _report(reason: str) -> None:
    print(f"csulora: interrupted: {reason}", file=sys.stderr, flush=True)
