"""Soak test of `csulora guard`: many uploads at once, slow, fast, good, broken and withdrawn, and a guard that is hit.

    python bench/stress/soak.py [--adapters 300] [--writers 4] [--events 30] [--json FILE]

Writers copy adapters into INCOMING. Meanwhile the guard is killed (-9), ended (SIGTERM) and started again, given
another policy (SIGHUP), its disk is full for a while, and uploads are taken out of INCOMING. In the end every good
adapter that is still there must be in OUTGOING, equal to what `csulora.correct` makes of it under the last policy, and
every broken one must be refused there. Each decision must stand in the log once. All the while an observer looks for
results that are there but not whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from inputs import make_subspace
from uploads import RANK, SHAPES, make_sources, upload

import csulora

SETTLE, PATIENCE = 0.4, 3.0
EVENTS = ("kill", "end", "policy", "full disk", "withdraw")


@dataclass
class Observer(threading.Thread):
    """Watches OUTGOING for adapters that are there but not whole."""

    outgoing: Path
    partial: list[str] = field(default_factory=list)
    finished: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Start watching."""
        super().__init__(daemon=True)
        self.start()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """Look, again and again."""
        present: dict[str, int] = {}
        while not self.finished.wait(0.02):
            now = inodes(self.outgoing)
            for name in (name for name in now if now[name] != present.get(name)):
                try:
                    csulora.load_adapter(self.outgoing / name)
                    json.loads((self.outgoing / name / "csulora_report.json").read_text())
                except (csulora.CsuloraError, OSError, ValueError) as error:
                    if inodes(self.outgoing).get(name) == now[name]:  # else it was replaced or withdrawn meanwhile
                        self.partial.append(f"{name}: {error}")
            present = now


def inodes(outgoing: Path) -> dict[str, int]:
    """Return the inode of every adapter by name."""
    found = {}
    for path in outgoing.glob("[!.]*"):
        try:
            if path.is_dir():
                found[path.name] = path.stat().st_ino
        except OSError:
            continue
    return found


@dataclass
class World:
    """The directories of a run, the guard, and what has been done to it."""

    work: Path
    jobs: int
    rng: random.Random
    events: Counter[str] = field(default_factory=Counter)
    withdrawn: list[str] = field(default_factory=list)
    ended_by_itself: int = 0
    unclean: int = 0
    policy: csulora.Policy = field(default_factory=csulora.Policy.csulora)

    def __post_init__(self) -> None:
        """Make the directories and start the guard."""
        self.incoming, self.outgoing, self.sources = (self.work / name for name in ("incoming", "outgoing", "sources"))
        for directory in (self.incoming, self.outgoing, self.sources):
            directory.mkdir()
        (self.incoming / ".csulora-incoming").touch()
        self.log, self.full, self.health = (self.work / name for name in ("log.jsonl", "full", "health"))
        self.subspace = make_subspace(self.work, SHAPES, RANK)
        self.policy.save(self.work / "policy.toml")
        self.guard = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the real command."""
        options = f"--watch --settle {SETTLE} --patience {PATIENCE} --jobs {self.jobs} --withdraw --quiet".split()
        files = [
            "--subspace",
            self.subspace,
            "--policy",
            self.work / "policy.toml",
            "--decisions",
            self.log,
            "--health",
            self.health,
        ]
        program = [sys.executable, Path(__file__).with_name("faulty_guard.py"), "guard", self.incoming, self.outgoing]
        return subprocess.Popen(
            list(map(str, [*program, *files, *options])), env=os.environ | {"FULL_DISK": str(self.full)}
        )

    def hit(self, event: str) -> None:
        """Do something to the guard, while it works."""
        self.wait_until_it_works()
        before = len(list(self.outgoing.glob("[!.]*")))
        end = time.monotonic() + 5
        while len(list(self.outgoing.glob("[!.]*"))) == before and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0.0, 0.5))
        self.events[event] += 1
        if event in ("kill", "end"):
            number = signal.SIGKILL if event == "kill" else signal.SIGTERM
            self.guard.send_signal(number)
            ended = self.guard.wait()
            self.ended_by_itself += event == "kill" and ended != -signal.SIGKILL
            self.unclean += event == "end" and ended != 0
            self.guard = self.start()
        elif event == "policy":
            self.policy = csulora.Policy.csulora(1.0 + 0.25 * self.events[event])
            self.policy.save(self.work / "policy.toml")
            self.guard.send_signal(signal.SIGHUP)
        elif event == "full disk":
            self.full.touch()
            time.sleep(self.rng.uniform(0.2, 1.5))
            self.full.unlink()
        else:
            self.withdraw()

    def wait_until_it_works(self) -> None:
        """Wait for the guard's first sign of life: before that a signal would test Python's start alone."""
        while self.guard.poll() is None:
            with suppress(OSError, ValueError):
                if json.loads(self.health.read_text())["pid"] == self.guard.pid:
                    return
            time.sleep(0.05)

    def withdraw(self) -> None:
        """Take an upload that has a result out of INCOMING, as ``mv`` does."""
        done = [path for path in sorted(self.incoming.glob("adapter-*")) if (self.outgoing / path.name).is_dir()]
        if done:
            chosen = self.rng.choice(done)
            chosen.rename(self.work / f"withdrawn-{chosen.name}")
            self.withdrawn.append(chosen.name)


def lines_of(log: Path) -> list[dict[str, Any]]:
    """Return the decisions of a log."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def all_decided(world: World, names: list[str]) -> bool:
    """Whether every adapter has a result by the last policy, and those that were withdrawn have none."""
    digest = hashlib.sha256((world.work / "policy.toml").read_bytes()).hexdigest()
    last = {line["name"]: line for line in lines_of(world.log) if line["verdict"] != "failed"}
    for name in names:
        if name not in last:
            return False
        if name in world.withdrawn:
            if last[name]["verdict"] != "withdrawn":
                return False
        elif last[name]["policy_sha256"] != digest or last[name]["verdict"] == "withdrawn":
            return False
    return True


def is_correct(source: Path, result: Path, subspace: csulora.Subspace, policy: csulora.Policy) -> bool:
    """Whether a result is what `csulora.correct` makes of its source."""
    expected, _ = csulora.correct(csulora.load_adapter(source), subspace, policy)
    try:
        found = csulora.load_adapter(result)
    except csulora.CsuloraError:
        return False
    return found.modules.keys() == expected.modules.keys() and all(
        torch.equal(found.modules[name].b, module.b) and torch.equal(found.modules[name].a, module.a)
        for name, module in expected.modules.items()
    )


def repeated(lines: list[dict[str, Any]]) -> list[str]:
    """Return decisions that were recorded more than once: same content, same rules; or a second withdrawal."""
    keys = Counter(
        (
            line["name"],
            line["verdict"],
            line["fingerprint"] if line["verdict"] != "withdrawn" else "",
            str(line["inputs"]),
        )
        for line in lines
        if line["verdict"] != "failed"
    )
    ids = Counter(line["id"] for line in lines)
    return [str(key) for key, count in (keys | ids).items() if count > 1]


def unrecorded(world: World, lines: list[dict[str, Any]]) -> list[str]:
    """Return results whose decision is not in the log, or whose files are not those that it names."""
    by_id = {line["id"]: line for line in lines}
    found = []
    for path in sorted(world.outgoing.glob("[!.]*")):
        record = json.loads((path / "csulora_guard.json" if path.is_dir() else path).read_text())
        line = by_id.get(record.get("decision"))
        files = {
            str(file): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (path.iterdir() if path.is_dir() else ())
            if file.name != "csulora_guard.json"
        }
        if line is None or line["outputs"] != files:
            found.append(path.name)
    return found


@dataclass
class Outcome:
    """What a soak test found; it passed if all were decided, the lists are empty and no guard ended by itself."""

    adapters: int
    broken: int
    events: dict[str, int]
    seconds: float
    decisions: int
    decided: bool
    wrong: list[str]
    let_through: list[str]
    partial: list[str]
    repeated: list[str]
    unrecorded: list[str]
    ended_by_itself: int
    clean_exit: bool

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong."""
        bad = self.wrong or self.let_through or self.partial or self.repeated or self.unrecorded
        return self.decided and self.clean_exit and not bad and not self.ended_by_itself


def soak(
    work: Path, adapters: int, writers: int, events: int, seed: int = 0, limit: float = 900.0, jobs: int = 2
) -> Outcome:
    """Run the test in the empty directory ``work`` for at most ``limit`` seconds."""
    rng, start = random.Random(seed), time.monotonic()
    world = World(work, jobs, rng)
    good, broken = make_sources(world.sources, adapters)
    everything = rng.sample(good + broken, adapters)
    observer = Observer(world.outgoing)
    threads = [
        threading.Thread(
            target=upload, args=(everything[i::writers], world.incoming, random.Random(seed + i), 1.5 * SETTLE)
        )
        for i in range(writers)
    ]
    for thread in threads:
        thread.start()
    for number in range(events):
        world.hit(EVENTS[number % len(EVENTS)])
    for thread in threads:
        thread.join()
    names = [path.name for path in everything]
    while not all_decided(world, names) and time.monotonic() - start < limit:
        time.sleep(0.5)
    decided = all_decided(world, names)
    time.sleep(2 * SETTLE)  # anything made twice would be made now
    world.ended_by_itself += world.guard.poll() is not None
    world.guard.send_signal(signal.SIGTERM)
    clean_exit = world.guard.wait(30) == 0 and not world.unclean
    observer.finished.set()
    observer.join()
    opened, lines = csulora.Subspace.open(world.subspace), lines_of(world.log)
    still = [path for path in good if path.name not in world.withdrawn]
    gone = [world.outgoing / name for name in world.withdrawn]
    return Outcome(
        adapters=adapters,
        broken=len(broken),
        events=dict(world.events),
        seconds=round(time.monotonic() - start, 1),
        decisions=len(lines),
        decided=decided,
        wrong=[path.name for path in still if not is_correct(path, world.outgoing / path.name, opened, world.policy)],
        let_through=[path.name for path in [*broken, *gone] if (world.outgoing / path.name).exists()],
        partial=observer.partial + [path.name for path in world.outgoing.glob(".*.csulora-tmp")],
        repeated=repeated(lines),
        unrecorded=unrecorded(world, lines),
        ended_by_itself=world.ended_by_itself,
        clean_exit=clean_exit,
    )


def main() -> None:
    """Run the soak test; exit 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=300)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="csulora-soak-"))
    outcome = soak(work, arguments.adapters, arguments.writers, arguments.events)
    text = json.dumps(asdict(outcome) | {"passed": outcome.passed}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if outcome.passed:
        shutil.rmtree(work)
    else:
        print(f"what was left is in {work}", file=sys.stderr)
    sys.exit(0 if outcome.passed else 1)


if __name__ == "__main__":
    main()
