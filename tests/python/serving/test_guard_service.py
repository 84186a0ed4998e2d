"""`csulora guard` as a service: jobs, withdrawal, quarantine, other rules, signals; nothing is lost or said twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import csulora
import factories
from csulora.errors import LogError
from csulora.serving.decisions import DecisionLog
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options
from csulora.serving.guard.judge import Judge
from csulora.serving.guard.outgoing import Outgoing
from csulora.serving.guard.plan import Planned, plan

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}
STRICT = csulora.Policy.none(max_undo=-100.0)  # refuses everything


class World:
    """INCOMING, OUTGOING, a log, and guards of them."""

    def __init__(self, directory: Path, subspace: Path) -> None:
        self.directory, self.subspace = directory, subspace
        self.incoming, self.outgoing, self.log = directory / "in", directory / "out", directory / "log.jsonl"
        self.incoming.mkdir()
        (self.incoming / ".csulora-incoming").touch()
        self.said: list[str] = []
        self.reload = threading.Event()

    def gate(self, policy: Any = "csulora") -> Gate:
        return Gate.open(self.subspace, policy, self.log, route="guard")

    def guard(
        self, policy: Any = "csulora", reopen: Callable[[], Gate] | None = None, **options: Any
    ) -> DirectoryGuard:
        settings, say = Options(**({"settle": 0.0, "patience": 0.0} | options)), self.said.append
        return DirectoryGuard(self.incoming, self.outgoing, self.gate(policy), settings, say, reopen, self.reload)

    def upload(self, *names: str, **settings: Any) -> None:
        for seed, name in enumerate(names):
            factories.save_adapter(self.incoming / name, MODULES, seed=seed, **settings)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.incoming / name)

    @property
    def results(self) -> set[str]:
        return {path.name for path in self.outgoing.iterdir() if not path.name.startswith(".")}

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        return [(line["name"], line["verdict"]) for line in self.lines]


@pytest.fixture
def world(tmp_path: Path, subspace: Path) -> World:
    return World(tmp_path, subspace)


def test_jobs_make_the_same_and_never_more_than_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a{number}" for number in range(8)]
    world.upload(*names)
    running, most, lock, original = 0, 0, threading.Lock(), Judge.decide

    def decide(self: Judge, *arguments: Any) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        try:
            return original(self, *arguments)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(Judge, "decide", decide)
    worker = world.guard(jobs=3)
    assert worker.scan()
    assert most == 3
    assert world.results == set(names)
    assert Counter(world.verdicts) == Counter((name, "corrected") for name in names)
    assert worker.summary == "8 corrected"


def test_the_summary_counts_what_stands(world: World) -> None:
    world.upload("good")
    world.upload("dora", use_dora=True)
    world.upload("half")
    (world.incoming / "half" / "adapter_model.safetensors").unlink()
    for _ in range(2):  # the second guard decides nothing
        worker = world.guard()
        assert worker.scan()
        assert worker.summary == "1 corrected, 1 refused, 1 invalid"
        assert worker.not_let_through == ["dora", "half"]
    assert len(world.lines) == 3


def test_what_leaves_incoming_leaves_outgoing(world: World) -> None:
    world.upload("good", "stays")
    world.upload("dora", use_dora=True)
    worker = world.guard(withdraw=True)
    assert worker.scan()
    world.remove("good")
    world.remove("dora")
    assert worker.scan()

    assert world.results == {"stays"}
    withdrawn = [line for line in world.lines if line["verdict"] == "withdrawn"]
    assert [(line["name"], line["reason_code"]) for line in withdrawn] == [
        ("dora", "upload-gone"),
        ("good", "upload-gone"),
    ]
    assert withdrawn[1]["adapter_sha256"] == world.lines[1]["adapter_sha256"]
    assert worker.scan()
    assert len(world.lines) == 5
    world.upload("good")
    assert worker.scan()
    assert "good" in world.results


def test_without_withdraw_it_stays(world: World) -> None:
    world.upload("good")
    worker = world.guard()
    assert worker.scan()
    world.remove("good")
    assert worker.scan()
    assert world.results == {"good"}


def test_an_upload_that_is_replaced_is_not_withdrawn(world: World) -> None:
    world.upload("good")
    worker = world.guard(withdraw=True, settle=0.3)
    while not worker.scan():
        time.sleep(0.05)
    world.remove("good")
    assert not worker.scan()
    world.upload("good")
    while not worker.scan():
        time.sleep(0.05)
    assert world.verdicts == [("good", "corrected")]


def test_a_volume_that_is_not_mounted_withdraws_nothing(world: World) -> None:
    world.upload("good")
    worker = world.guard(withdraw=True)
    assert worker.scan()
    mounted = world.incoming.rename(world.directory / "volume")
    world.incoming.mkdir()  # the mount point
    with pytest.raises(OSError, match=r"/in: lacks \.csulora-incoming; nothing is withdrawn"):
        worker.scan()
    assert world.results == {"good"}
    with pytest.raises(csulora.InputError, match=r"make it once: touch .*/in/\.csulora-incoming"):
        world.guard(withdraw=True)
    world.incoming.rmdir()
    mounted.rename(world.incoming)
    assert worker.scan()
    assert world.verdicts == [("good", "corrected")]


def test_an_outgoing_that_is_gone_is_named_and_waited_for(world: World) -> None:
    world.upload("a")
    worker = world.guard(withdraw=True)
    thread = threading.Thread(target=worker.run, args=(True, 0.01))
    thread.start()
    try:
        wait_until(lambda: world.outgoing.is_dir() and world.results == {"a"})
        world.outgoing.rename(world.directory / "away")
        wait_until(lambda: any("nothing is decided on now: " in line for line in world.said))
        (world.directory / "away").rename(world.outgoing)
        world.upload("b")
        wait_until(lambda: world.results == {"a", "b"})
    finally:
        worker.stop()
        thread.join()
    assert [line for line in world.said if "nothing is decided on now" in line and str(world.outgoing) in line]


def test_quarantine_holds_what_is_refused_and_why(world: World) -> None:
    world.upload("good")
    world.upload("dora", use_dora=True)
    aside = world.directory / "aside"
    worker = world.guard(quarantine=aside, withdraw=True)
    assert worker.scan()
    assert worker.scan()

    refused = next(line for line in world.lines if line["verdict"] == "refused")
    place = f"dora.{refused['id']}"
    assert {path.name for path in aside.iterdir()} == {place, f"{place}.refused.json"}
    assert (aside / place / "adapter_config.json").is_file()
    assert json.loads((aside / f"{place}.refused.json").read_text())["reason_code"] == "not-plain-lora"
    assert world.results == {"good", "dora.refused.json"}  # whoever uploaded it still sees why
    assert len(world.lines) == 2
    world.upload("dora")
    assert worker.scan()
    assert world.results == {"good", "dora"}


def test_a_quarantine_that_is_gone_leaves_the_upload_and_one_decision(world: World) -> None:
    world.upload("dora", use_dora=True)
    aside = world.directory / "aside"
    worker = world.guard(quarantine=aside)
    aside.rmdir()
    assert worker.scan()
    assert worker.scan()
    assert any("dora: stays in" in line and "no such directory" in line for line in world.said)
    assert [verdict for _, verdict in world.verdicts] == ["refused"]
    assert (world.incoming / "dora").is_dir()

    assert world.guard(quarantine=aside).scan()
    assert not (world.incoming / "dora").exists()
    assert len(world.lines) == 1


@pytest.mark.parametrize("place", ["in/aside", "out/aside", "."])
def test_quarantine_lies_apart(place: str, world: World) -> None:
    with pytest.raises(csulora.InputError, match="must not lie inside each other"):
        world.guard(quarantine=world.directory / place)


def test_other_rules_decide_anew_and_the_old_copy_stays_until_then(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.upload("a", "b")
    assert world.guard().scan()
    before = (world.outgoing / "b" / "adapter_model.safetensors").read_bytes()
    worker, original = world.guard("project"), Outgoing.publish

    def publish(self: Outgoing, name: str, *rest: Any) -> Any:
        assert (world.outgoing / "b" / "adapter_model.safetensors").read_bytes() == before
        return original(self, name, *rest)

    monkeypatch.setattr(Outgoing, "publish", publish)
    assert worker.run(watch=False)
    assert any(line.startswith("2 results are of another policy") for line in world.said)
    assert (world.outgoing / "b" / "adapter_model.safetensors").read_bytes() != before
    assert len({line["fingerprint"] for line in world.lines}) == 2


def test_rules_that_refuse_take_the_old_copy_away(world: World) -> None:
    world.upload("a")
    assert world.guard().scan()
    assert world.guard(STRICT).scan()
    assert world.results == {"a.refused.json"}
    assert world.lines[-1]["reason_code"] == "undo-limit"


def running(worker: DirectoryGuard) -> threading.Thread:
    thread = threading.Thread(target=worker.run, kwargs={"watch": True, "interval": 0.02})
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_reload_reads_rules_again_and_keeps_the_old_ones_if_they_are_unusable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csulora.serving.guard.service._HEARTBEAT", 0.02)
    told: list[str] = []
    monkeypatch.setattr("csulora.serving.guard.service.notify", told.append)
    policy, health = world.directory / "policy.toml", world.directory / "health"
    csulora.Policy.csulora().save(policy)
    world.upload("a")
    worker = world.guard(policy, lambda: world.gate(policy), health=health)
    thread = running(worker)
    try:
        wait_until(lambda: any("a: corrected" in line for line in world.said) and health.is_file())
        policy.write_text("off = 'much'")
        world.reload.set()
        wait_until(lambda: json.loads(health.read_text())["reload_error"] is not None)
        assert "stay as they were" in world.said[-1]
        assert world.verdicts == [("a", "corrected")]
        STRICT.save(policy)
        world.reload.set()
        wait_until(lambda: world.results == {"a.refused.json"})
        wait_until(lambda: json.loads(health.read_text())["verdicts"] == {"refused": 1})
        state = json.loads(health.read_text())
        assert state["ready"]
        assert state["reload_error"] is None
        assert state["fingerprint"] == world.lines[-1]["fingerprint"]
        assert any(state.startswith("RELOADING=1\nMONOTONIC_USEC=") for state in told)
    finally:
        worker.stop()
        thread.join()
    assert not health.exists()
    assert world.verdicts == [("a", "corrected"), ("a", "refused")]


def test_a_decision_that_hangs_leaves_the_health_file_stale(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csulora.serving.guard.service._HEARTBEAT", 0.02)
    monkeypatch.setattr("csulora.serving.guard.service._LONGEST_DECISION", 0.05)
    started, finish, health = threading.Event(), threading.Event(), world.directory / "health"
    original = Judge.decide

    def decide(self: Judge, *arguments: Any) -> str:
        started.set()
        assert finish.wait(60)
        return original(self, *arguments)

    monkeypatch.setattr(Judge, "decide", decide)
    world.upload("a")
    worker = world.guard(health=health)
    thread = running(worker)
    try:
        assert started.wait(60)
        time.sleep(0.2)
        before = health.read_text()
        assert not json.loads(before)["ready"]
        time.sleep(0.2)
        assert health.read_text() == before
    finally:
        finish.set()
        worker.stop()
        thread.join()


def killed(*arguments: object) -> None:
    os._exit(9)


def run_until_killed(world: World, owner: type, name: str, deadly: Callable[..., Any]) -> None:
    """Let another process guard, which ends where it calls a method."""
    child = os.fork()
    if child == 0:
        setattr(owner, name, deadly)
        with suppress(BaseException):
            world.guard(withdraw=True).scan()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("moment", ["before publishing", "before recording", "after recording"])
@pytest.mark.parametrize("kind", ["corrected", "refused", "withdrawn"])
def test_a_killed_guard_loses_no_decision_and_repeats_none(moment: str, kind: str, world: World) -> None:
    world.upload("a", **({"use_dora": True} if kind == "refused" else {}))
    if kind == "withdrawn":
        assert world.guard(withdraw=True).scan()
        world.remove("a")
    record = DecisionLog.restore
    if moment == "before publishing":
        publishing = {"corrected": "publish", "refused": "refuse", "withdrawn": "clear"}[kind]
        run_until_killed(world, Outgoing, publishing, killed)
    elif moment == "before recording":
        run_until_killed(world, DecisionLog, "restore", killed)
    else:
        run_until_killed(world, DecisionLog, "restore", lambda *arguments: (record(*arguments), killed()))

    worker = world.guard(withdraw=True)
    for _ in range(2):
        assert worker.scan()
    assert world.results == {"corrected": {"a"}, "refused": {"a.refused.json"}, "withdrawn": set()}[kind]
    wanted = [("a", "corrected"), ("a", "withdrawn")] if kind == "withdrawn" else [("a", kind)]
    assert world.verdicts == wanted
    if kind == "corrected":
        (line,) = world.lines
        files = {name: str(world.outgoing / "a" / name) for name in ("adapter_config.json", "README.md")}
        assert set(files.values()) <= line["outputs"].keys()
        assert len(line["outputs"]) == 4
    assert not [path for path in world.outgoing.iterdir() if "deciding" in path.name]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
def test_what_a_killed_guard_left_of_an_upload_that_is_gone_is_removed(world: World) -> None:
    world.upload("a")
    run_until_killed(world, Judge, "_deliver", killed)
    assert [path for path in world.outgoing.iterdir() if "deciding" in path.name]
    world.remove("a")
    assert world.guard().scan()
    assert not list(world.outgoing.iterdir())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
def test_a_killed_guard_has_refused_a_name_that_cannot_be_printed(world: World) -> None:
    world.upload("a\n\udcff")
    run_until_killed(world, DecisionLog, "restore", killed)
    assert world.guard().scan()
    assert [line["reason_code"] for line in world.lines] == ["unsafe-name"]


def test_a_withdrawal_that_cannot_be_logged_is_logged_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.upload("a")
    worker = world.guard(withdraw=True)
    assert worker.scan()
    world.remove("a")

    def full(self: DecisionLog, document: object) -> None:
        raise LogError("no space is left")

    with monkeypatch.context() as broken:
        broken.setattr(DecisionLog, "restore", full)
        worker.scan()
        assert world.results == set()
    assert worker.scan()
    assert world.verdicts == [("a", "corrected"), ("a", "withdrawn")]


def test_failures_of_this_machine_are_logged_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.upload("a")
    worker = world.guard()

    def full(self: Outgoing, *arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Outgoing, "publish", full)
        for _ in range(3):
            assert not worker.scan() or worker._entries["a"].failures == 3
            worker._entries["a"].since = -1e9
    assert world.results == {"a.refused.json"}
    assert worker.scan()
    assert world.results == {"a"}
    assert [(line["verdict"], line["reason_code"]) for line in world.lines] == [
        ("failed", "machine"),
        ("corrected", None),
    ]


def test_a_plan_says_what_would_change_and_writes_nothing(world: World) -> None:
    world.upload("a", "b")
    assert world.guard().scan()
    world.upload("new")
    before = {path: path.stat().st_mtime_ns for path in world.directory.rglob("*")}

    same = {row.name: row for row in plan(world.incoming, world.outgoing, world.gate())}
    strict = {row.name: row for row in plan(world.incoming, world.outgoing, Gate.open(world.subspace, STRICT))}

    assert {path: path.stat().st_mtime_ns for path in world.directory.rglob("*")} == before
    assert [row.is_changed for row in same.values()] == [False, False, True]
    assert same["new"].verdict_now is None
    assert (strict["a"].verdict_now, strict["a"].verdict) == ("corrected", "refused")
    assert strict["a"].undo_now == same["a"].undo_after == world.lines[0]["totals"]["largest_undo_after"]
    assert strict["new"].reason_code == "undo-limit"
    assert Planned("a", "corrected", "corrected", 0.5, 0.1, 0.1, 0.2, 0.2).is_changed is False


def command(world: World, *options: object) -> list[str]:
    rest = ["--subspace", world.subspace, "--policy", "csulora", "--settle", "0.1", "--patience", "0.1", *options]
    return [sys.executable, "-m", "csulora", "guard", *map(str, [world.incoming, world.outgoing, *rest])]


def test_hangup_reads_the_policy_again(world: World) -> None:
    world.upload("a")
    policy = world.directory / "policy.toml"
    csulora.Policy.csulora().save(policy)
    arguments = command(world, "--watch", "--policy", policy, "--decisions", world.log)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: world.outgoing.is_dir() and world.results == {"a"})
            STRICT.save(policy)
            os.kill(process.pid, signal.SIGHUP)
            wait_until(lambda: world.results == {"a.refused.json"})
        finally:
            os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "policy and subspace file were read again: they are others" in output
    assert output.splitlines()[-1] == "1 refused"
    assert world.verdicts == [("a", "corrected"), ("a", "refused")]
