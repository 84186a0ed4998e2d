import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from csulora.serving import turns


@pytest.fixture
def two_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_turns", threading.Semaphore(2))


@pytest.mark.usefixtures("two_turns")
def test_no_more_threads_than_turns_are_inside() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    @turns.turn()
    def work(_: int) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most == 2


@pytest.mark.usefixtures("two_turns")
def test_failure_gives_the_turn_back() -> None:
    for _ in range(5):
        with pytest.raises(ValueError, match="refused"), turns.turn():
            raise ValueError("refused")
    assert turns._turns._value == 2


@pytest.mark.usefixtures("two_turns")
def test_threads_that_hang_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LONGEST_WAIT", 0.01)
    with turns.turn(), turns.turn():
        with turns.turn():
            pass
        assert turns._turns._value == 0  # who had no turn gives none back
    assert turns._turns._value == 2


@pytest.mark.usefixtures("two_turns")
def test_forked_process_has_all_turns() -> None:
    with turns.turn(), turns.turn():
        child = os.fork()
        if child == 0:
            os._exit(0 if turns._turns.acquire(blocking=False) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
