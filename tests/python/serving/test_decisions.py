import errno
import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

import csulora
from csulora.serving.decisions import Decision, DecisionLog, LogError

REFUSED = Decision("some/adapter", None, "subspace", "policy", "refused", "a reason: ü", None, 0.25)


def record_many(path: Path) -> None:
    log = DecisionLog(path)
    for _ in range(200):
        log.record(REFUSED)


def test_a_line_per_decision(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    log.record(REFUSED)
    log.record(REFUSED)

    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["time"] <= second["time"]
    assert first | {"time": None} == {
        "time": None,
        "adapter": "some/adapter",
        "adapter_sha256": None,
        "subspace_sha256": "subspace",
        "policy_sha256": "policy",
        "verdict": "refused",
        "reason": "a reason: ü",
        "totals": None,
        "seconds": 0.25,
    }


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    writers = [get_context("spawn").Process(target=record_many, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 400
    assert all(json.loads(line)["verdict"] == "refused" for line in lines)


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    log.record(REFUSED)
    whole, write = (tmp_path / "log.jsonl").read_bytes(), os.write
    room = iter([10])

    def write_until_full(descriptor: int, data: bytes) -> int:
        if (left := next(room, 0)) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:left])

    with monkeypatch.context() as full:
        full.setattr(os, "write", write_until_full)
        with pytest.raises(LogError, match="No space left"):
            log.record(REFUSED)
    assert (tmp_path / "log.jsonl").read_bytes() == whole
    log.record(REFUSED)
    assert len(list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))) == 2


def test_log_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(csulora.InputError, match="cannot be logged"):
        DecisionLog(tmp_path / "absent" / "log.jsonl")
