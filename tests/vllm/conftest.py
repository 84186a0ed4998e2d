"""vLLM's environment, and what it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import adapters

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "CSULORA_POLICY": "csulora",
}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return adapters.make(tmp_path_factory.mktemp("files"), "csulora")


@pytest.fixture(scope="session")
def offline(files: SimpleNamespace) -> dict:
    """What `offline.py` found: the engine's answers before and after the guard was put in."""
    request = files.root / "request.json"
    request.write_text(
        json.dumps(
            {
                "model": str(files.model),
                "subspace": str(files.subspace),
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
