"""Adapters of experts over HTTP: corrected as PEFT answers with the corrected file, or refused with the reason.

The engine's process gets `expert_kernels` from a plugin of vLLM's own kind, since vLLM has none for a CPU.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import expert_servers
import pytest
from answers import assert_same, assert_unlike
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm_server import GUARDED, Server, running

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    made = expert_servers.make(tmp_path_factory.mktemp("files"), "Qwen 3 MoE", "protect")
    words = {f"<{i}>": i for i in range(64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<0>").save_pretrained(str(made.model))
    return made


@pytest.fixture(scope="module")
def server(files: SimpleNamespace) -> Iterator[Server]:
    plugin = expert_servers.kernels_plugin(files.root, "vllm.general_plugins")
    command = [*GUARDED, str(files.model), "--subspace", str(files.subspace), "--policy", files.policy]
    command += ["--decisions", str(files.root / "decisions.jsonl")]
    variables = {"PYTHONPATH": f"{plugin}:{HERE}", "CSULORA_POLICY": files.policy}
    with running(command, files.root / "guarded.log", **variables) as guarded:
        yield guarded


def ask(server: Server, model: str) -> dict[str, list]:
    options = {"max_tokens": expert_servers.STEPS, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    body = {"model": model, "prompt": expert_servers.PROMPT, "return_tokens_as_token_ids": True, **options}
    status, text = server.call("/v1/completions", body)
    assert status == 200, text
    found = json.loads(text)["choices"][0]["logprobs"]
    return {
        "tokens": [int(token.removeprefix("token_id:")) for token in found["tokens"]],
        "logprobs": found["token_logprobs"],
    }


def test_base_model_answers_as_transformers(server: Server, files: SimpleNamespace) -> None:
    assert_same(ask(server, str(files.model)), expert_servers.answer(files.model, None))


@pytest.mark.parametrize("name", ["both", "one by one"])
def test_adapter_of_experts_is_corrected(name: str, server: Server, files: SimpleNamespace) -> None:
    """One adapter is held at a time, so that the second evicts the first."""
    status, text = server.load(name, files.raw[name])
    assert status == 200, text
    found = ask(server, name)

    assert_same(found, expert_servers.answer(files.model, files.corrected[name]))
    assert_unlike(found, expert_servers.answer(files.model, None))
    if name == "both":
        assert_unlike(found, expert_servers.answer(files.model, files.raw[name]))


def test_an_evicted_adapter_comes_back_corrected(server: Server, files: SimpleNamespace) -> None:
    assert_same(ask(server, "both"), expert_servers.answer(files.model, files.corrected["both"]))


def test_what_the_server_would_not_apply_is_refused(server: Server, files: SimpleNamespace) -> None:
    status, text = server.load("all-linear", files.raw["all-linear"])

    assert status == 400
    assert "ignores the update of model.layers.0.mlp.gate, a router" in text
    assert server.healthy()


def test_every_decision_is_recorded(server: Server, files: SimpleNamespace) -> None:
    lines = (files.root / "decisions.jsonl").read_text().splitlines()
    verdicts = {json.loads(line)["verdict"] for line in lines}

    assert verdicts >= {"corrected", "refused"}
