import errno
import json
import os
import socket
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import csulora
import factories
from csulora.correction.report import Totals
from csulora.errors import LogError, reason_codes
from csulora.serving.decisions import Decision, DecisionLog, schema, versions

REFUSED = factories.decision()


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
    assert first["host"] == socket.gethostname()
    assert first["versions"] == versions()
    assert {key: value for key, value in first.items() if key not in ("time", "host", "versions")} == asdict(REFUSED)


def test_schema_names_every_field_and_every_reason() -> None:
    document = schema()
    jsonschema.Draft202012Validator.check_schema(document)
    assert document["required"] == list(document["properties"])
    assert set(document["properties"]) == {field.name for field in fields(Decision)} | {"time", "host", "versions"}
    totals = document["properties"]["totals"]["anyOf"][1]
    assert totals["required"] == list(totals["properties"]) == [field.name for field in fields(Totals)]
    codes = document["properties"]["reason_code"]["enum"]
    assert codes == [None, *reason_codes()], "a reason that is not in serving/decision.schema.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"reason_code": "no-reason"},
        {"reason_code": None},
        {"verdict": "corrected"},
        {"subspace_sha256": "abc"},
        {"outputs": {"file": "5" * 64}},
        {"policy": None, "policy_text": None},
        {"seconds": -1.0},
    ],
)
def test_schema_refuses_what_no_decision_is(changes: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(factories.decision().to_dict())
    assert not validator.is_valid(factories.decision(**changes).to_dict())


def test_the_page_explains_every_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "pages" / "operating.md").read_text()
    missing = [name for name in [*schema()["properties"], *reason_codes()] if f"`{name}`" not in page]
    assert not missing


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


def test_nothing_is_added_to_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"id": "half')
    log = DecisionLog(path)
    log.record(factories.decision())
    log.record(factories.decision())
    half, *whole = path.read_bytes().splitlines()
    assert half == b'{"id": "half'
    assert [json.loads(line)["name"] for line in whole] == ["adapter", "adapter"]
