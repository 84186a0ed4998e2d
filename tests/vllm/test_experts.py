"""Adapters of experts answer as PEFT does with the corrected ones, whatever layout they come in.

vLLM has no kernels for them on a CPU, so that `expert_kernels` takes their place; all else is vLLM's.
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

# Model -> whether the server takes both layouts, and which layout its clients say that all of their adapters have.
SERVED = {
    "Qwen 3 MoE": (False, True),
    "Mixtral": (True, True),
    "Granite MoE": (False, False),  # which PEFT reads in one layout only, as Qwen 2 MoE
    "Qwen 2 MoE": (False, False),
    "gpt-oss": (False, False),
}
# What vLLM ignores of adapters of all-linear.
IGNORED = {
    "Qwen 3 MoE": "model.layers.0.mlp.gate, a router",
    "Qwen 2 MoE": "model.layers.0.mlp.shared_expert_gate, the gate of a shared expert",
}


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, its adapters, and what a guarded engine answers with them."""
    files = expert_servers.make(tmp_path_factory.mktemp("files"), request.param, "protect")
    mixed, claim = SERVED[request.param]
    asked = {"prompt": expert_servers.PROMPT, "steps": expert_servers.STEPS, "mixed": mixed, "claim": claim}
    paths = {"model": str(files.model), "adapters": [str(path) for path in files.raw.values()]}
    (files.root / "request.json").write_text(json.dumps(asked | paths))
    command = [sys.executable, Path(__file__).with_name("experts_offline.py"), files.root / "request.json"]
    variables = {"CSULORA_SUBSPACE": str(files.subspace), "CSULORA_POLICY": files.policy}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULTS ")]
    assert len(lines) == 1, run.stdout[-6000:] + run.stderr[-6000:]
    return SimpleNamespace(family=request.param, files=files, answers=json.loads(lines[0].removeprefix("RESULTS ")))


def test_model_answers_as_transformers(served: SimpleNamespace) -> None:
    assert_same(served.answers["base"], expert_servers.answer(served.files.model, None))


@pytest.mark.parametrize("name", ["both", "gate and up", "all-linear", "one by one", "shared expert"])
def test_adapter_of_experts_is_corrected(name: str, served: SimpleNamespace) -> None:
    files = served.files
    if name not in files.raw or (name == "all-linear" and served.family in IGNORED):
        pytest.skip("no such adapters of this model")
    found, again = (served.answers[f"{files.raw[name]}{suffix}"] for suffix in ("", " again"))
    assert isinstance(found, dict), found

    assert_same(found, expert_servers.answer(files.model, files.corrected[name]))
    assert again == found
    if name != "one by one":  # which PEFT cannot load as it is
        assert_unlike(found, expert_servers.answer(files.model, files.raw[name]))


def test_update_that_the_server_ignores_is_refused(served: SimpleNamespace) -> None:
    if served.family not in IGNORED:
        pytest.skip("this model calls its router itself, or all-linear leaves it out")
    answer = served.answers[str(served.files.raw["all-linear"])]

    assert "VLLMValidationError: csulora: " in answer
    assert f"ignores the update of {IGNORED[served.family]}; name it in the policy's drop_uncovered" in answer


def test_rank_that_the_server_does_not_take_is_refused_before(served: SimpleNamespace) -> None:
    answer = served.answers[str(served.files.raw["rank 16"])]

    assert "VLLMValidationError: csulora: " in answer
    assert "and the server takes 8; raise --max-lora-rank" in answer
