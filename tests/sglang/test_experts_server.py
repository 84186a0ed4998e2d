"""Adapters of experts over HTTP: corrected as PEFT answers with the corrected file, or refused with the reason.

The schedulers get `expert_kernels` from a plugin of SGLang's own kind, since SGLang has none for a CPU.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import expert_servers
import pytest
from answers import assert_same, assert_unlike
from options import ENGINE, arguments
from sglang_server import Server, running

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return expert_servers.make(tmp_path_factory.mktemp("files"), "Qwen 3 MoE", "protect")


@pytest.fixture(scope="module")
def server(files: SimpleNamespace) -> Iterator[Server]:
    plugin = expert_servers.kernels_plugin(files.root, "sglang.srt.plugins")
    command = ["--model-path", files.model, "--subspace", files.subspace, "--policy", files.policy]
    command += ["--decisions", files.root / "decisions.jsonl", "--skip-tokenizer-init"]
    command += arguments(ENGINE | {"max_lora_rank": 8})
    path = os.pathsep.join([str(plugin), str(HERE), os.environ["PYTHONPATH"]])
    with running(command, files.root / "server.log", PYTHONPATH=path) as guarded:
        yield guarded


def ask(server: Server, adapter: str | None) -> dict[str, list]:
    options = {"max_new_tokens": expert_servers.STEPS, "temperature": 0, "ignore_eos": True}
    return server.ask(adapter, expert_servers.PROMPT, options)


def test_base_model_answers_as_transformers(server: Server, files: SimpleNamespace) -> None:
    assert_same(ask(server, None), expert_servers.answer(files.model, None))


@pytest.mark.parametrize("name", ["both", "gate and up", "one by one"])
def test_adapter_of_experts_is_corrected(name: str, server: Server, files: SimpleNamespace) -> None:
    """Two adapters are held at a time, so that the third evicts the first."""
    status, loaded = server.load(name, files.raw[name])
    assert (status, loaded["success"]) == (200, True), loaded
    found = ask(server, name)

    assert_same(found, expert_servers.answer(files.model, files.corrected[name]))
    assert_unlike(found, expert_servers.answer(files.model, None))
    if name != "one by one":  # which PEFT cannot load as it is
        assert_unlike(found, expert_servers.answer(files.model, files.raw[name]))


def test_an_evicted_adapter_comes_back_corrected(server: Server, files: SimpleNamespace) -> None:
    assert_same(ask(server, "both"), expert_servers.answer(files.model, files.corrected["both"]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("all-linear", "SGLang has no LoRA for a router"), ("rank 16", "the server takes 8; raise --max-lora-rank")],
)
def test_what_the_server_would_not_apply_is_refused(
    name: str, reason: str, server: Server, files: SimpleNamespace
) -> None:
    status, found = server.load(name, files.raw[name])

    assert status == 400
    assert found["error_message"].startswith("csulora: ")
    assert reason in found["error_message"]
    assert server.healthy()


def test_every_decision_is_recorded(server: Server, files: SimpleNamespace) -> None:
    lines = (files.root / "decisions.jsonl").read_text().splitlines()
    verdicts = {json.loads(line)["verdict"] for line in lines}

    assert verdicts >= {"corrected", "refused"}
