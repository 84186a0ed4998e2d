"""The routes of vLLM's Python interface, against the same engine before the guard was put in."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers import assert_same, assert_unlike


@pytest.fixture(scope="module")
def results(files: SimpleNamespace) -> dict:
    request = files.root / "request.json"
    request.write_text(
        json.dumps(
            {
                "model": str(files.model),
                "pack": str(files.pack),
                "plain": [str(path) for path in (*files.raw.values(), *files.corrected.values())],
                "guarded": [str(path) for path in files.raw.values()],
                "bad": [str(path) for path in files.bad.values()],
            }
        )
    )
    script = Path(__file__).with_name("offline.py")
    run = subprocess.run([sys.executable, script, request], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULTS ")]
    assert len(lines) == 1, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULTS "))


@pytest.mark.parametrize("route", ["lora_request", "add_lora"])
@pytest.mark.parametrize("name", ["one", "two"])
def test_route_is_corrected(route: str, name: str, results: dict, files: SimpleNamespace) -> None:
    found = results[route][str(files.raw[name])]

    assert_same(found, results["plain"][str(files.corrected[name])])
    assert_unlike(found, results["plain"][str(files.raw[name])])


def test_refusals_give_the_reason_and_leave_the_engine_alone(results: dict, files: SimpleNamespace) -> None:
    for name, path in files.bad.items():
        for answer in results["refused"][str(path)]:
            assert files.reasons[name] in answer, (name, answer)
    assert_same(results["base after"], results["base"])
