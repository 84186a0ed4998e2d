"""SGLang's environment, and what it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import adapters

HERE = Path(__file__).parent

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE / "stand_ins"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
}
os.environ.pop("CSULORA_POLICY", None)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return adapters.make(tmp_path_factory.mktemp("files"), "project")


def ask(files: SimpleNamespace, what: str, **variables: str) -> dict:
    """Run `engine.py` in a process of its own, and return what it found."""
    request = files.root / f"{what}.json"
    paths = {
        name: {key: str(path) for key, path in getattr(files, name).items()} for name in ("raw", "corrected", "bad")
    }
    request.write_text(json.dumps({"what": what, "model": str(files.model), **paths}))
    environment = os.environ | variables
    command = [sys.executable, HERE / "engine.py", request]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULTS ")]
    assert len(lines) == 1, run.stdout[-3000:] + run.stderr[-6000:]
    return {"log": run.stderr, **json.loads(lines[0].removeprefix("RESULTS "))}


@pytest.fixture(scope="session")
def plain(files: SimpleNamespace) -> dict:
    """What an unguarded engine answers with the raw adapters and with those that `csulora correct` wrote."""
    return ask(files, "plain")


@pytest.fixture(scope="session")
def guarded(files: SimpleNamespace) -> dict:
    """What an engine answers after `csulora.hooks.sglang.activate`, by every way into it."""
    variables = {"CSULORA_SUBSPACE": str(files.subspace), "CSULORA_POLICY": "project"}
    return ask(files, "guarded", **variables, CSULORA_DECISIONS=str(files.root / "engine.jsonl"))
