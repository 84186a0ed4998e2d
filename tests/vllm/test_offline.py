"""The routes of vLLM's Python interface, against the same engine before the guard was put in."""

from types import SimpleNamespace

import pytest
from answers import assert_same, assert_unlike


@pytest.mark.parametrize("route", ["lora_request", "add_lora"])
@pytest.mark.parametrize("name", ["one", "two"])
def test_route_is_corrected(route: str, name: str, offline: dict, files: SimpleNamespace) -> None:
    found = offline[route][str(files.raw[name])]

    assert_same(found, offline["plain"][str(files.corrected[name])])
    assert_unlike(found, offline["plain"][str(files.raw[name])])


def test_refusals_give_the_reason_and_leave_the_engine_alone(offline: dict, files: SimpleNamespace) -> None:
    for name, path in files.bad.items():
        for answer in offline["refused"][str(path)]:
            assert files.reasons[name] in answer, (name, answer)
            assert ": csulora: " in answer
    assert_same(offline["base after"], offline["base"])


def test_upload_that_is_deleted_while_its_request_waits_is_answered(offline: dict, files: SimpleNamespace) -> None:
    assert_same(offline["deleted"], offline["plain"][str(files.corrected["two"])])


def test_worker_loads_nothing_that_was_not_checked(offline: dict) -> None:
    assert "csulora: " in offline["unchecked"]
    assert "did not check it" in offline["unchecked"]
