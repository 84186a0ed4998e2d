import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from csulora.serving import limiter


@pytest.fixture
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "_limiter", threading.Semaphore(2))


@pytest.mark.usefixtures("two_at_a_time")
def test_no_more_threads_than_the_limit_are_inside() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    @limiter.limited()
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


@pytest.mark.usefixtures("two_at_a_time")
def test_failure_lets_the_next_one_through() -> None:
    for _ in range(5):
        with pytest.raises(ValueError, match="refused"), limiter.limited():
            raise ValueError("refused")
    assert limiter._limiter._value == 2


@pytest.mark.usefixtures("two_at_a_time")
def test_threads_that_hang_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "_LONGEST_WAIT", 0.01)
    with limiter.limited(), limiter.limited():
        with limiter.limited():
            pass
        assert limiter._limiter._value == 0  # who was not let through gives nothing back
    assert limiter._limiter._value == 2


@pytest.mark.usefixtures("two_at_a_time")
def test_forked_process_has_the_whole_limit() -> None:
    with limiter.limited(), limiter.limited():
        child = os.fork()
        if child == 0:
            os._exit(0 if limiter._limiter.acquire(blocking=False) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
