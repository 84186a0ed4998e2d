"""Adapters of experts answer as PEFT does with the corrected ones, whatever layout they come in.

SGLang has no kernels for them on a CPU, so that `expert_kernels` takes their place; all else is SGLang's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import expert_servers
import pytest
from answers import assert_same, assert_unlike


@pytest.fixture(scope="module", params=["Qwen 3 MoE", "Mixtral"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, its adapters, and what a guarded engine answers with them."""
    files = expert_servers.make(tmp_path_factory.mktemp("files"), request.param, "protect")
    asked = {"prompt": expert_servers.PROMPT, "steps": expert_servers.STEPS, "max_rank": 8}
    paths = {"model": str(files.model), "adapters": {name: str(path) for name, path in files.raw.items()}}
    (files.root / "request.json").write_text(json.dumps(asked | paths))
    command = [sys.executable, Path(__file__).with_name("experts_engine.py"), files.root / "request.json"]
    variables = {"CSULORA_SUBSPACE": str(files.subspace), "CSULORA_POLICY": files.policy}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULTS ")]
    assert len(lines) == 1, run.stdout[-3000:] + run.stderr[-6000:]
    answers = json.loads(lines[0].removeprefix("RESULTS "))
    return SimpleNamespace(files=files, answers=answers)


@pytest.mark.parametrize("name", ["both", "gate and up", "one by one"])
def test_adapter_of_experts_is_corrected(name: str, served: SimpleNamespace) -> None:
    files, found = served.files, served.answers.get(name)
    assert isinstance(found, dict), found

    assert_same(found, expert_servers.answer(files.model, files.corrected[name]))
    if name != "one by one":  # which PEFT cannot load as it is
        assert_unlike(found, expert_servers.answer(files.model, files.raw[name]))


def test_model_answers_as_transformers(served: SimpleNamespace) -> None:
    assert_same(served.answers["base"], expert_servers.answer(served.files.model, None))


def test_update_of_a_router_is_refused(served: SimpleNamespace) -> None:
    answer = served.answers["all-linear"]

    assert answer.startswith("csulora: ")
    assert "SGLang has no LoRA for a router" in answer


def test_rank_that_the_server_does_not_take_is_refused(served: SimpleNamespace) -> None:
    assert "and the server takes 8; raise --max-lora-rank" in served.answers["rank 16"]
