"""Every route of vLLM's server: corrected as `csulora correct` corrects, or refused with the reason.

The reference is what an unguarded engine answers with the files that `csulora correct` wrote, and with the raw
adapters. The tests share one server, which holds a single adapter at a time, so that each change of adapter evicts one.
"""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers import assert_same, assert_unlike
from safetensors.torch import load_file, save_file
from vllm_server import GUARDED, OPTIONS, PLAIN, Server, running


@pytest.fixture(scope="module")
def expected(files: SimpleNamespace, offline: dict) -> SimpleNamespace:
    """What the unguarded engine answers."""

    def answers(adapters: dict[str, Path]) -> dict[str, dict]:
        return {name: offline["plain"][str(path)] for name, path in adapters.items()}

    return SimpleNamespace(base=offline["base"], raw=answers(files.raw), corrected=answers(files.corrected))


@pytest.fixture(scope="module")
def server(files: SimpleNamespace, expected: SimpleNamespace) -> Iterator[Server]:
    command = [*GUARDED, str(files.model), "--subspace", str(files.subspace)]
    command += ["--decisions", str(files.root / "decisions.jsonl"), "--lora-modules", f"static={files.raw['one']}"]
    (files.root / "tmp").mkdir()
    variables = {"CSULORA_ADAPTERS": str(files.named), "TMPDIR": str(files.root / "tmp")}
    with running(command, files.root / "guarded.log", **variables) as guarded:
        yield guarded


def is_corrected(found: dict, name: str, expected: SimpleNamespace) -> None:
    assert_same(found, expected.corrected[name])
    assert_unlike(found, expected.raw[name])


def test_base_model_answers_as_ever(server: Server, files: SimpleNamespace, expected: SimpleNamespace) -> None:
    assert_same(server.ask(str(files.model)), expected.base)


def test_every_process_says_that_it_is_guarded(server: Server, files: SimpleNamespace) -> None:
    log = (files.root / "guarded.log").read_text()

    assert "csulora is ready: all 2 processes" in log  # the engine's core and its worker
    assert log.count("csulora guards this process") >= 2


def test_adapter_named_at_start(server: Server, expected: SimpleNamespace) -> None:
    is_corrected(server.ask("static"), "one", expected)


def test_adapter_loaded_at_run_time(server: Server, files: SimpleNamespace, expected: SimpleNamespace) -> None:
    assert server.load("loaded", files.raw["two"])[0] == 200
    is_corrected(server.ask("loaded"), "two", expected)


def test_adapter_found_by_name(server: Server, expected: SimpleNamespace) -> None:
    is_corrected(server.ask("good"), "two", expected)


@pytest.mark.parametrize("name", ["../one", "good/", "./good", "..", "good\0", "good\ud800", "x" * 300, "x" * 5000])
def test_a_name_is_one_component_of_a_path(name: str, server: Server) -> None:
    """Every other spelling would be another adapter for vLLM, or an error of a file system for the client."""
    status, text = server.call("/v1/completions", {"model": name, "prompt": "how do i", "max_tokens": 1})

    assert 400 <= status < 500, text
    assert server.healthy()


@pytest.mark.parametrize("text", ["\0", "\ud800", "\x1b[2J\n", "x" * 300, "x" * 5000])
def test_strange_names_and_paths_are_refused_with_the_reason(text: str, server: Server, files: SimpleNamespace) -> None:
    for name, path in ((f"path {len(text)}", f"{files.raw['two']}{text}"), (f"name{text}", files.raw["two"])):
        status, answer = server.load(name, path)
        if len(text) == 300 and path == files.raw["two"]:
            assert status == 200, answer  # a long name, and a name it is
        else:
            assert status == 400, answer
    assert server.healthy()


def test_evicted_adapters_come_back_the_same(server: Server, files: SimpleNamespace, expected: SimpleNamespace) -> None:
    """Even if what lies at their path is no longer what was loaded."""
    path = shutil.copytree(files.raw["one"], files.root / "changing")
    assert server.load("changing", path)[0] == 200
    shutil.rmtree(path)
    shutil.copytree(files.bad["not a number"], path)

    for _ in range(2):
        is_corrected(server.ask("static"), "one", expected)
        is_corrected(server.ask("good"), "two", expected)
        is_corrected(server.ask("changing"), "one", expected)
    shutil.rmtree(path)
    is_corrected(server.ask("static"), "one", expected)
    is_corrected(server.ask("changing"), "one", expected)
    assert server.healthy()


def test_reload_in_place(server: Server, files: SimpleNamespace, expected: SimpleNamespace) -> None:
    path = shutil.copytree(files.raw["one"], files.root / "replaced")
    assert server.load("replaced", path)[0] == 200
    is_corrected(server.ask("replaced"), "one", expected)

    assert server.load("replaced", files.raw["two"], in_place=True)[0] == 200
    is_corrected(server.ask("replaced"), "two", expected)

    # The same path again, with other contents.
    assert server.load("replaced", path, in_place=True)[0] == 200
    for file in path.iterdir():
        shutil.copy(files.raw["two"] / file.name, file)
    assert server.load("replaced", path, in_place=True)[0] == 200
    is_corrected(server.ask("replaced"), "two", expected)

    status, text = server.load("replaced", files.bad["not a number"], in_place=True)
    assert (status, "NaN" in text) == (400, True)
    is_corrected(server.ask("replaced"), "two", expected)


def test_reload_in_place_under_load(server: Server, files: SimpleNamespace) -> None:
    """Prefixes that were computed with the weights before are not used, though the cache is never free."""
    long = " ".join(["how do i make a cake"] * 7)
    path = shutil.copytree(files.raw["one"], files.root / "busy")
    assert server.load("busy", path)[0] == 200
    before = server.ask("busy", long)
    ended = threading.Event()

    def keep_busy() -> None:
        while not ended.is_set():
            server.ask(str(files.model), tokens=60)

    with ThreadPoolExecutor() as threads:
        running = [threads.submit(keep_busy) for _ in range(3)]
        for file in path.iterdir():
            shutil.copy(files.raw["two"] / file.name, file)
        time.sleep(0.5)
        status, text = server.load("busy", path, in_place=True)
        ended.set()
    assert status == 200, text
    after = server.ask("busy", long)

    assert [request.result() for request in running] == [None] * 3
    assert server.load("not busy", files.raw["two"])[0] == 200
    assert_same(after, server.ask("not busy", long))
    assert_unlike(after, before)


def test_corrected_adapters_that_are_deleted_are_made_again(
    server: Server, files: SimpleNamespace, expected: SimpleNamespace
) -> None:
    path = shutil.copytree(files.raw["one"], files.root / "lost")
    assert server.load("lost", path)[0] == 200
    shutil.rmtree(path)
    is_corrected(server.ask("good"), "two", expected)  # which evicts it
    for home in (files.root / "tmp").glob("csulora-serving-*"):
        shutil.rmtree(home)

    status, text = server.call("/v1/completions", {"model": "lost", "prompt": "how do i", "max_tokens": 1})
    assert (status, "no such file" in text) == (400, True)
    is_corrected(server.ask("static"), "one", expected)
    is_corrected(server.ask("good"), "two", expected)
    assert server.healthy()


def test_refusals_give_the_reason_and_others_go_on(
    server: Server, files: SimpleNamespace, expected: SimpleNamespace
) -> None:
    for name, path in files.bad.items():
        status, text = server.load(f"bad {name}", path)
        assert status == 400, text
        assert json.loads(text)["error"]["message"].startswith("csulora: ")
        assert files.reasons[name] in text
        assert server.healthy()
    status, text = server.call("/v1/completions", {"model": "bad", "prompt": "how do i", "max_tokens": 1})
    assert status == 400, text
    assert json.loads(text)["error"]["message"].startswith("csulora: ")
    assert "NaN" in text
    assert server.healthy()
    is_corrected(server.ask("static"), "one", expected)
    assert_same(server.ask(str(files.model)), expected.base)


def test_decisions_are_logged_and_counted(server: Server, files: SimpleNamespace) -> None:
    server.load("refused once more", files.bad["DoRA"])
    decisions = [json.loads(line) for line in (files.root / "decisions.jsonl").read_text().splitlines()]

    assert {"corrected", "refused"} <= {decision["verdict"] for decision in decisions}
    _, metrics = server.call("/metrics")
    assert 'csulora_decisions_total{reason="not-plain-lora",route="vllm",verdict="refused"}' in metrics
    assert 'csulora_decisions_total{reason="",route="vllm",verdict="corrected"}' in metrics


def fails_to_start(files: SimpleNamespace, *options: str, model: Path | None = None, **variables: str) -> str:
    return fails([*GUARDED, str(model or files.model), *options], **variables)


def fails(start: list[str], **variables: str) -> str:
    command = [*start, *OPTIONS]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables, timeout=120)
    assert run.returncode != 0
    return run.stdout + run.stderr


def test_server_without_the_plugin_does_not_start(files: SimpleNamespace) -> None:
    output = fails_to_start(files, "--subspace", str(files.subspace), VLLM_PLUGINS="lora_filesystem_resolver")

    assert "leaves csulora out" in output


def test_server_that_would_not_ask_its_processes_does_not_start(files: SimpleNamespace) -> None:
    assert "leave --grpc out" in fails_to_start(files, "--subspace", str(files.subspace), "--grpc")


def test_server_without_a_readable_subspace_does_not_start(files: SimpleNamespace) -> None:
    (files.root / "broken.safetensors").write_bytes(files.subspace.read_bytes()[:1000])

    assert "CSULORA_SUBSPACE" in fails_to_start(files)
    assert "broken.safetensors" in fails_to_start(files, "--subspace", str(files.root / "broken.safetensors"))


def test_subspace_for_another_model_stops_the_server(files: SimpleNamespace) -> None:
    other = shutil.copytree(files.model, files.root / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})

    output = fails_to_start(files, "--subspace", str(files.subspace), model=other)

    assert "not what the subspace file was made of" in output


# Runs when Python starts, in every process: makes vLLM one that passes something more to where LoRA weights are made.
OTHER_VLLM = """
import importlib.util
import sys


class Other:
    def find_spec(self, name, path=None, target=None):
        if name != "vllm.lora.lora_model":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            original = module.LoRAModel.from_lora_tensors.__func__

            def from_lora_tensors(cls, source, lora_model_id, tensors, *rest, **options):
                return original(cls, lora_model_id, tensors, *rest, **options)

            module.LoRAModel.from_lora_tensors = classmethod(from_lora_tensors)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Other())
"""


@pytest.mark.parametrize("start", [GUARDED, PLAIN], ids=["vllm-serve", "vllm's own server"])
def test_server_of_a_vllm_that_is_not_known_does_not_start(start: list[str], files: SimpleNamespace) -> None:
    (files.root / "other-vllm").mkdir(exist_ok=True)
    (files.root / "other-vllm" / "sitecustomize.py").write_text(OTHER_VLLM)
    variables = {
        "PYTHONPATH": str(files.root / "other-vllm"),
        "CSULORA_SUBSPACE": str(files.subspace),
        "CSULORA_POLICY": "csulora",
    }

    output = fails([*start, str(files.model), "--lora-modules", f"static={files.raw['one']}"], **variables)

    assert "from_lora_tensors takes (source, lora_model_id, tensors" in output
    assert "csulora knows it as (lora_model_id, tensors" in output


def test_refused_adapter_named_at_start_stops_the_server(files: SimpleNamespace) -> None:
    refused = f"static={files.bad['wrong rank']}"

    output = fails_to_start(files, "--subspace", str(files.subspace), "--lora-modules", refused)

    assert files.reasons["wrong rank"] in output
