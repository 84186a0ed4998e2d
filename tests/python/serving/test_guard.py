"""`csulora guard`: complete results or a reason, whatever happens to uploads and to the guard itself."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import csulora
import factories
import gguf_files
from csulora.errors import LogError
from csulora.serving.decisions import DecisionLog
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options
from csulora.serving.guard.outgoing import Outgoing

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def guard(
    incoming: Path,
    subspace: Path,
    policy: csulora.Policy | str = "csulora",
    decisions: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> DirectoryGuard:
    gate = Gate.open(subspace, policy, decisions, route="guard")
    settings = Options(**({"settle": 0.0, "patience": 0.0} | options))
    return DirectoryGuard(incoming, incoming.with_name("out"), gate, settings, say)


def test_gguf_files_come_out_as_gguf_files(incoming: Path, subspace: Path, tmp_path: Path) -> None:
    model = gguf_files.save_model(tmp_path / "model.gguf", factories.llama_weights())
    loaded = csulora.load_adapter(factories.save_adapter(tmp_path / "peft", MODULES))
    csulora.save_adapter(loaded, incoming / "one.gguf", "gguf", base_model=model)
    out = incoming.with_name("out")
    worker = guard(incoming, subspace, base_model=model)

    assert worker.scan()

    expected, _ = csulora.correct(
        csulora.load_adapter(incoming / "one.gguf", model), csulora.Subspace.open(subspace), csulora.Policy.csulora()
    )
    found = csulora.load_adapter(out / "one.gguf", model)
    for name, module in expected.modules.items():
        assert torch.allclose(found.modules[name].b @ found.modules[name].a, module.b @ module.a, atol=1e-5)
    before = (out / "one.gguf").stat().st_ino
    assert guard(incoming, subspace, base_model=model).scan()
    assert (out / "one.gguf").stat().st_ino == before

    (incoming / "one.gguf").write_bytes(b"GGUF")
    assert worker.scan()
    assert {path.name for path in out.iterdir()} == {"one.gguf.refused.json"}


def test_gguf_files_named_in_capitals(incoming: Path, subspace: Path, tmp_path: Path) -> None:
    model = gguf_files.save_model(tmp_path / "model.gguf", factories.llama_weights())
    loaded = csulora.load_adapter(factories.save_adapter(tmp_path / "peft", MODULES))
    csulora.save_adapter(loaded, incoming / "ONE.GGUF", base_model=model)
    assert guard(incoming, subspace, base_model=model).scan()
    assert {"ONE.GGUF", "ONE.GGUF.csulora_guard.json"} <= results(incoming)
    assert csulora.load_adapter(incoming.with_name("out") / "ONE.GGUF", model).format == "gguf"


def test_a_signature_of_an_earlier_gguf_file_does_not_stay(incoming: Path, subspace: Path, tmp_path: Path) -> None:
    model = gguf_files.save_model(tmp_path / "model.gguf", factories.llama_weights())
    loaded = csulora.load_adapter(factories.save_adapter(tmp_path / "peft", MODULES))
    csulora.save_adapter(loaded, incoming / "one.gguf", "gguf", base_model=model)
    assert guard(incoming, subspace, base_model=model).scan()
    for suffix in ("sig", "intoto.jsonl"):
        (tmp_path / "out" / f"one.gguf.{suffix}").touch()
    assert guard(incoming, subspace, "project", base_model=model).scan()
    assert results(incoming) == {"one.gguf", "one.gguf.csulora_guard.json"}


def test_gguf_without_its_model_is_refused(incoming: Path, subspace: Path, tmp_path: Path) -> None:
    model = gguf_files.save_model(tmp_path / "model.gguf", factories.llama_weights())
    loaded = csulora.load_adapter(factories.save_adapter(tmp_path / "peft", MODULES))
    csulora.save_adapter(loaded, incoming / "one.gguf", "gguf", base_model=model)

    assert guard(incoming, subspace).scan()

    assert "--base-model" in refusal(incoming, "one.gguf")["reason"]


def refusal(incoming: Path, name: str) -> dict[str, str]:
    return json.loads((incoming.with_name("out") / f"{name}.refused.json").read_text())


def test_result_is_what_correct_makes(incoming: Path, subspace: Path) -> None:
    source = factories.save_adapter(incoming / "one", MODULES)

    assert guard(incoming, subspace).scan()

    expected, _ = csulora.correct(
        csulora.load_adapter(source), csulora.Subspace.open(subspace), csulora.Policy.csulora()
    )
    found = csulora.load_adapter(incoming.with_name("out") / "one")
    assert all((found.modules[name].b == module.b).all() for name, module in expected.modules.items())


def test_malformed_and_refused_adapters_give_a_reason(incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / "dora", MODULES, use_dora=True)
    (factories.save_adapter(incoming / "half", MODULES) / "adapter_model.safetensors").unlink()
    tensors = load_file(factories.save_adapter(incoming / "nan", MODULES) / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, incoming / "nan" / "adapter_model.safetensors")
    (incoming / "some.gguf").write_bytes(b"not GGUF")

    assert guard(incoming, subspace).scan()

    names = ("dora", "half", "nan", "some.gguf")
    reasons = {name: refusal(incoming, name)["reason"] for name in names}
    assert "DoRA" in reasons["dora"]
    assert "no such file" in reasons["half"]
    assert "NaN" in reasons["nan"]
    assert not [path for path in incoming.with_name("out").iterdir() if path.is_dir()]


def test_links_are_refused(incoming: Path, subspace: Path, tmp_path: Path) -> None:
    outside = factories.save_adapter(tmp_path / "outside", MODULES)
    (incoming / "link").symlink_to(outside)
    inside = factories.save_adapter(incoming / "inside", MODULES) / "adapter_model.safetensors"
    inside.unlink()
    inside.symlink_to(outside / "adapter_model.safetensors")

    assert guard(incoming, subspace).scan()

    assert "symbolic link" in refusal(incoming, "link")["reason"]
    assert "symbolic link" in refusal(incoming, "inside")["reason"]


def test_other_files_and_hidden_directories_are_left_alone(incoming: Path, subspace: Path) -> None:
    (incoming / "README.md").write_text("hello")
    factories.save_adapter(incoming / ".uploading", MODULES)

    assert guard(incoming, subspace).scan()

    assert list(incoming.with_name("out").iterdir()) == []


def test_partial_uploads_are_waited_for(incoming: Path, subspace: Path) -> None:
    weights = factories.save_adapter(incoming / "slow", MODULES) / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    worker = guard(incoming, subspace, patience=1000)
    said: list[str] = []
    worker.say = said.append

    assert not worker.scan()
    assert not list(incoming.with_name("out").iterdir())
    weights.write_bytes(data[:-5])  # it goes on, and halts again
    assert not worker.scan()
    assert not worker.scan()
    (line,) = said
    assert line.startswith(f"slow: not readable yet ({weights}: not a readable safetensors file: ")
    assert line.endswith("; waiting up to 1000 s")
    weights.write_bytes(data)
    assert worker.scan()
    assert (incoming.with_name("out") / "slow").is_dir()
    weights.write_bytes(data[:-10])
    assert not worker.scan()
    assert [line.partition(",")[0].partition(" (")[0] for line in said[1:]] == [
        "slow: corrected",
        "slow: not readable yet",
    ]


def test_what_still_changes_is_not_read(incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / "fresh", MODULES)

    assert not guard(incoming, subspace, settle=1000).scan()
    assert not list(incoming.with_name("out").iterdir())


def inode(incoming: Path, name: str) -> int:
    return (incoming.with_name("out") / name).stat().st_ino


def test_restart_redoes_only_what_changed(incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / "same", MODULES)
    factories.save_adapter(incoming / "other", MODULES)
    guard(incoming, subspace).scan()
    before = inode(incoming, "same"), inode(incoming, "other")
    shutil.rmtree(incoming / "other")
    factories.save_adapter(incoming / "other", MODULES, seed=77)

    assert guard(incoming, subspace).scan()

    assert inode(incoming, "same") == before[0]
    assert inode(incoming, "other") != before[1]


def test_another_policy_redoes_everything(incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / "one", MODULES)
    guard(incoming, subspace).scan()
    before = inode(incoming, "one")

    guard(incoming, subspace, csulora.Policy.project()).scan()

    assert inode(incoming, "one") != before


def test_adapter_that_turns_bad_is_withdrawn_and_comes_back(incoming: Path, subspace: Path) -> None:
    out = incoming.with_name("out")
    factories.save_adapter(incoming / "one", MODULES)
    worker = guard(incoming, subspace)
    worker.scan()
    shutil.rmtree(incoming / "one")
    factories.save_adapter(incoming / "one", MODULES, use_dora=True)

    worker.scan()
    assert not (out / "one").exists()
    assert (out / "one.refused.json").is_file()

    shutil.rmtree(incoming / "one")
    factories.save_adapter(incoming / "one", MODULES)
    worker.scan()
    assert (out / "one").is_dir()
    assert not (out / "one.refused.json").exists()


def test_directory_that_csulora_did_not_write_is_not_replaced(incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / "one", MODULES)
    worker = guard(incoming, subspace)
    (incoming.with_name("out") / "one").mkdir()
    (incoming.with_name("out") / "one" / "mine").write_text("mine")

    assert worker.scan()

    assert "not written by csulora" in refusal(incoming, "one")["reason"]
    assert (incoming.with_name("out") / "one" / "mine").read_text() == "mine"


def test_a_decision_that_cannot_be_logged_is_none(
    incoming: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: DecisionLog, decision: object) -> None:
        raise LogError("no space is left")

    factories.save_adapter(incoming / "good", MODULES)
    said: list[str] = []
    with monkeypatch.context() as broken:
        broken.setattr(DecisionLog, "record", full)
        assert not guard(incoming, subspace, say=said.append).scan()
    assert [line.partition(",")[0] for line in said] == ["good: not decided on"]
    assert results(incoming) == {"good.refused.json"}
    assert "no space is left" in refusal(incoming, "good")["reason"]
    assert guard(incoming, subspace).scan()
    assert results(incoming) == {"good"}


def results(incoming: Path) -> set[str]:
    return {path.name for path in incoming.with_name("out").iterdir() if not path.name.startswith(".")}


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def fails_for(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let publishing one adapter fail."""
    original = Outgoing.publish

    def publish(self: Outgoing, found: str, *rest: object) -> object:
        if found == name:
            raise error
        return original(self, found, *rest)

    monkeypatch.setattr(Outgoing, "publish", publish)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), LogError("the log is full")])
def test_what_the_machine_fails_to_do_is_tried_again(
    error: Exception, incoming: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        factories.save_adapter(incoming / name, MODULES)
    worker = guard(incoming, subspace, decisions=tmp_path / "log.jsonl")
    with monkeypatch.context() as broken:
        fails_for("b", error, broken)
        assert not worker.scan()
        assert results(incoming) == {"a", "b.refused.json", "c"}
    worker._entries["b"].since = -1e9
    assert worker.scan()
    assert results(incoming) == {"a", "b", "c"}
    verdicts = {str(line["verdict"]) for line in lines(tmp_path / "log.jsonl")}
    assert verdicts >= {"corrected"}


def test_an_unforeseen_error_refuses_one_upload_and_no_other(
    incoming: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        factories.save_adapter(incoming / name, MODULES)
    fails_for("b", ValueError("out of range"), monkeypatch)
    assert guard(incoming, subspace, decisions=tmp_path / "log.jsonl").scan()
    assert results(incoming) == {"a", "b.refused.json", "c"}
    assert [line["verdict"] for line in lines(tmp_path / "log.jsonl")] == ["corrected", "failed", "corrected"]


def test_without_watch_what_stays_undecided_is_an_error(
    incoming: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factories.save_adapter(incoming / "good", MODULES)
    fails_for("good", OSError(28, "No space left on device"), monkeypatch)
    monkeypatch.setattr("csulora.serving.guard.entries.LONGEST_WAIT", 0.0)
    with pytest.raises(csulora.InputError, match=r"1 uploads could not be decided on; good: .*No space left"):
        guard(incoming, subspace).run(watch=False, interval=0.0)


def test_nothing_printed_or_logged_holds_what_a_terminal_would_obey(
    incoming: Path, subspace: Path, tmp_path: Path
) -> None:
    evil = "\x1b[2J\nmodel: corrected, relative change 0.0%\u202e"
    path = factories.save_adapter(incoming / "evil", MODULES)
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({f"{evil}{'x' * 100_000}": next(iter(tensors.values()))}, path / "adapter_model.safetensors")
    factories.save_adapter(incoming / "name\n\x1b[2J", MODULES)
    (incoming / ("\u00e9" * 120 + ".gguf")).touch()
    said: list[str] = []
    assert guard(incoming, subspace, decisions=tmp_path / "log.jsonl", say=said.append).scan()

    written = [file.read_text() for file in [*incoming.with_name("out").iterdir(), tmp_path / "log.jsonl"]]
    assert all(line.isprintable() and len(line) < 3000 for line in said)
    assert all(line.isprintable() and len(line) < 5000 for text in written for line in text.splitlines())
    assert len(said) == len(results(incoming)) == len(lines(tmp_path / "log.jsonl")) == 3
    assert {str(line["verdict"]) for line in lines(tmp_path / "log.jsonl")} == {"refused"}


@pytest.mark.parametrize("name", ["\x01" * 70, "\U000e0001" * 60, "\u00e9" * 120, "\n"])
def test_whatever_a_name_is_its_refusal_has_one(name: str, incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / name, MODULES)
    assert guard(incoming, subspace).scan()
    (found,) = results(incoming)
    assert found.isprintable()
    assert found.endswith(".refused.json")


def test_a_result_for_another_base_model_is_made_anew(incoming: Path, subspace: Path, tmp_path: Path) -> None:
    weights = [factories.llama_weights(layers) for layers in (2, 3)]
    models = [gguf_files.save_model(tmp_path / f"{count}.gguf", found) for count, found in enumerate(weights)]
    loaded = csulora.load_adapter(factories.save_adapter(tmp_path / "peft", MODULES))
    csulora.save_adapter(loaded, incoming / "one.gguf", "gguf", base_model=models[0])
    out = incoming.with_name("out")
    assert guard(incoming, subspace).scan()
    assert results(incoming) == {"one.gguf.refused.json"}
    made = []
    for model in models:
        worker = guard(incoming, subspace, base_model=model)
        assert worker.scan()
        made.append(json.loads((out / "one.gguf.csulora_guard.json").read_text())["base_model"])
    assert made[0] != made[1]


def test_an_upload_that_kills_guards_comes_last_and_then_not_at_all(incoming: Path, subspace: Path) -> None:
    for name in ("a", "b"):
        factories.save_adapter(incoming / name, MODULES)
    kill = """
import os, sys
from csulora.serving import open_decision as gate
original = gate.load_adapter
gate.load_adapter = lambda path, *rest: os._exit(9) if path.name == "a" else original(path, *rest)
from csulora.cli.app import main
main()
"""
    for times in range(3):
        command = [sys.executable, "-c", kill, *command_of(incoming, subspace)]
        assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 9
        assert results(incoming) == (set() if times == 0 else {"b"})
    assert guard(incoming, subspace).scan()
    assert results(incoming) == {"a.refused.json", "b"}
    assert "were killed" in refusal(incoming, "a")["reason"]


def command_of(incoming: Path, subspace: Path) -> list[str]:
    paths = [str(incoming), str(incoming.with_name("out")), "--subspace", str(subspace)]
    return ["guard", *paths, "--policy", "csulora", "--settle", "0", "--patience", "0"]


def test_an_upload_of_very_many_files_is_neither_listed_nor_hashed(incoming: Path, subspace: Path) -> None:
    path = factories.save_adapter(incoming / "many", MODULES)
    for count in range(1200):
        (path / f"{count}.safetensors").touch()
    os.truncate(path / "0.safetensors", 16 << 30)
    start = time.monotonic()
    assert guard(incoming, subspace).scan()
    assert "more than 1000 files" in refusal(incoming, "many")["reason"]
    assert time.monotonic() - start < 5  # hashing takes longer


def test_a_long_decision_leaves_the_guard_answering(
    incoming: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, finish = threading.Event(), threading.Event()
    told: list[str] = []

    def publish(self: Outgoing, *arguments: object) -> None:
        started.set()
        assert finish.wait(60)

    factories.save_adapter(incoming / "long", MODULES)
    monkeypatch.setattr(Outgoing, "publish", publish)
    monkeypatch.setattr("csulora.serving.guard.service.notify", told.append)
    monkeypatch.setattr("csulora.serving.guard.service._HEARTBEAT", 0.01)
    monkeypatch.setattr("csulora.serving.guard.service._GRACE", 0.01)
    worker = guard(incoming, subspace)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(worker.run, watch=True)
        assert started.wait(60)
        while told.count("WATCHDOG=1") < 3:
            time.sleep(0.01)
        worker.stop()
        assert running.result(60) is False
        assert told[-1] == "STOPPING=1"
        finish.set()


@pytest.mark.parametrize("name", ["one.gguf", "one.refused.json", "one.gguf.csulora_guard.json"])
def test_a_directory_that_is_named_like_something_else_is_refused(name: str, incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / name, MODULES)
    assert guard(incoming, subspace).scan()
    refusal = json.loads((incoming.with_name("out") / f"{name}.refused.json").read_text())
    assert (refusal["reason_code"], "rename it" in refusal["reason"]) == ("unsafe-name", True)
    assert results(incoming) == {f"{name}.refused.json"}


def test_outgoing_must_be_a_directory_or_have_one_to_lie_in(incoming: Path, subspace: Path) -> None:
    with pytest.raises(csulora.InputError, match="no such directory; create it first"):
        DirectoryGuard(incoming, incoming.with_name("absent") / "out", Gate.open(subspace, "csulora"))
    with pytest.raises(csulora.InputError, match="is no directory; name another place"):
        DirectoryGuard(incoming, subspace, Gate.open(subspace, "csulora"))


def test_directories_must_be_apart(incoming: Path, subspace: Path) -> None:
    with pytest.raises(csulora.InputError, match="must not lie inside each other; choose another place"):
        DirectoryGuard(incoming, incoming / "out", Gate.open(subspace, "csulora"))
    with pytest.raises(csulora.InputError, match="no such directory; name the one that adapters are uploaded to"):
        DirectoryGuard(incoming / "absent", incoming.with_name("out"), Gate.open(subspace, "csulora"))


def command(incoming: Path, subspace: Path, *options: str) -> list[str]:
    paths = [str(incoming), str(incoming.with_name("out")), "--subspace", str(subspace), "--settle", "0.1"]
    return [sys.executable, "-m", "csulora", "guard", *paths, "--policy", "csulora", *options]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(number: signal.Signals, incoming: Path, subspace: Path) -> None:
    factories.save_adapter(incoming / "one", MODULES)
    with subprocess.Popen(command(incoming, subspace, "--watch"), stdout=subprocess.PIPE, text=True) as process:
        while not (incoming.with_name("out") / "one").is_dir():
            assert process.poll() is None
            time.sleep(0.05)
        second = subprocess.run(command(incoming, subspace), capture_output=True, text=True, check=False)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=30)

    assert process.returncode == 0
    assert "one: corrected" in output
    assert second.returncode == 4
    assert "another guard" in second.stderr


def listener(address: str) -> socket.socket:
    """A socket as systemd listens on; ``@`` stands for the zero byte of an abstract one."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(address.replace("@", "\0"))
    receiver.settimeout(60)
    return receiver


@pytest.mark.parametrize("name", ["{}/notify", "@csulora-test-{}"])
def test_systemd_is_told(name: str, incoming: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready once it guards, alive while it works, stopping when a signal has ended it."""
    factories.save_adapter(incoming / "one", MODULES)
    address = name.format(incoming.parent if name.startswith("{") else os.getpid())
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    watching = command(incoming, subspace, "--watch")
    with listener(address) as systemd, subprocess.Popen(watching, stdout=subprocess.DEVNULL) as process:
        told = [systemd.recv(64)]
        while not (incoming.with_name("out") / "one").is_dir():
            told.append(systemd.recv(64))
        os.kill(process.pid, signal.SIGTERM)
        while told[-1] != b"STOPPING=1":
            told.append(systemd.recv(64))
        process.wait()

    assert process.returncode == 0
    assert told[0] == b"READY=1"
    assert len(told) >= 3
    assert set(told[1:-1]) == {b"WATCHDOG=1"}


@pytest.mark.parametrize("address", ["", "{}/nobody", "{}", "/" * 300])
def test_systemd_that_does_not_listen_stops_nothing(
    address: str, incoming: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factories.save_adapter(incoming / "one", MODULES)
    monkeypatch.setenv("NOTIFY_SOCKET", address.format(incoming))

    guard(incoming, subspace).run(watch=False)

    assert (incoming.with_name("out") / "one").is_dir()


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench" / "stress"))
    return importlib.import_module("soak")


def test_small_soak(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "EVENTS", ("kill", "policy", "withdraw"))
    outcome = soak.soak(tmp_path, adapters=10, writers=2, events=3)

    assert outcome.passed, outcome
    assert outcome.broken == 3
