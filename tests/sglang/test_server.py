"""The routes of SGLang's HTTP server, started by `csulora sglang-serve`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers import assert_same, assert_unlike
from engine import OPTIONS, PROMPT
from options import ENGINE, arguments
from sglang_server import GUARDED, Server, running


@pytest.fixture(scope="module")
def server(files: SimpleNamespace) -> Iterator[Server]:
    command = ["--subspace", files.subspace, "--policy", "project", "--decisions", files.root / "log.jsonl"]
    command += ["--model-path", files.model, "--lora-paths", f"static={files.raw['one']}", *arguments(ENGINE)]
    with running(command, files.root / "server.log") as guarded:
        yield guarded


def ask(server: Server, adapter: str | None) -> dict[str, list]:
    return server.ask(adapter, PROMPT, OPTIONS)


def test_adapter_named_at_start(server: Server, plain: dict) -> None:
    assert_same(ask(server, "static"), plain["corrected-one"])
    assert_unlike(ask(server, "static"), plain["raw-one"])


def test_adapter_loaded_at_run_time(server: Server, files: SimpleNamespace, plain: dict) -> None:
    status, found = server.load("two", files.raw["two"])
    assert (status, found["success"]) == (200, True)
    assert_same(ask(server, "two"), plain["corrected-two"])
    assert_same(ask(server, None), plain["base"])


def test_refusals_give_the_reason_and_others_go_on(server: Server, files: SimpleNamespace, plain: dict) -> None:
    for name, path in files.bad.items():
        status, found = server.load(name, path)
        assert status == 400
        assert found["error_message"].startswith("csulora: ")
        assert files.reasons[name] in found["error_message"]
    body = {"lora_name": "tensors", "serialized_named_tensors": [""], "config_dict": {}}
    status, text = server.call("/load_lora_adapter_from_tensors", body)
    assert status == 400
    assert json.loads(text)["error_message"].startswith("csulora: tensors: adapters are loaded from a directory")
    assert_same(ask(server, "static"), plain["corrected-one"])


def test_every_decision_is_in_the_log(server: Server, files: SimpleNamespace) -> None:
    decisions = [json.loads(line) for line in (files.root / "log.jsonl").read_text().splitlines()]
    assert {"corrected", "refused", "invalid"} <= {decision["verdict"] for decision in decisions}


FREE = "import csulora.hooks.sglang as hook, sglang, options; hook.activate(); "
UNGUARDED = (
    FREE + "from csulora.hooks.sglang import front_end; front_end.Guarded = lambda function, fingerprint: function; "
    "sglang.Engine(model_path={model!r}, **options.ENGINE)"
)
SIGNATURE = (
    "from sglang.srt.managers.tokenizer_manager import TokenizerManager\n"
    "async def load(self, adapter, request=None): ...\n"
    "TokenizerManager.load_lora_adapter = load\n"
    "import csulora.hooks.sglang as hook; hook.activate()"
)
VERSION = "import sglang; sglang.__version__ = '0.5.24'; import csulora.hooks.sglang as hook; hook.activate()"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (UNGUARDED, "schedulers of SGLang are guarded by [None]"),
        (SIGNATURE, "takes (self, adapter, request)"),
        (VERSION, "is for SGLang 0.5.23, and this is 0.5.24"),
    ],
)
def test_nothing_starts_that_is_not_guarded(code: str, reason: str, files: SimpleNamespace) -> None:
    variables = {"CSULORA_SUBSPACE": str(files.subspace), "CSULORA_POLICY": "project"}
    script = f"if __name__ == '__main__':\n    exec({code.format(model=str(files.model))!r})"
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
        cwd=Path(__file__).parent,
        timeout=300,
    )
    assert found.returncode == 1
    assert reason in found.stderr


@pytest.mark.parametrize(
    ("options", "variables", "reason"),
    [
        (["--speculative-algorithm", "NGRAM", "--uno-lora-path", "adapter"], {}, "--uno-lora-path adapter"),
        (["--dp-size", "2"], {}, "--dp-size 2"),
        (["--tokenizer-worker-num", "2"], {}, "--tokenizer-worker-num 2"),
        ([], {"SGLANG_RUST_SERVER": "1"}, "unset SGLANG_RUST_SERVER"),
        (["--lora-paths", "bad={bad}"], {}, "NaN"),
        ([], {"CSULORA_SUBSPACE": ""}, "CSULORA_SUBSPACE is not set"),
    ],
)
def test_ways_that_are_not_covered_do_not_start(
    options: list[str], variables: dict[str, str], reason: str, files: SimpleNamespace
) -> None:
    command = [*GUARDED, "--model-path", str(files.model), *arguments(ENGINE)]
    command += [option.format(bad=files.bad["not a number"]) for option in options]
    environment = {"CSULORA_SUBSPACE": str(files.subspace), "CSULORA_POLICY": "project"} | variables
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=300
    )
    assert found.returncode in (3, 4), found.stderr[-3000:]
    assert reason in found.stderr
