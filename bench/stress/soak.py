"""Soak test of `csulora guard`: many uploads at once, slow and fast, good and broken, and a guard that is killed.

    python bench/stress/soak.py [--adapters 200] [--writers 4] [--kills 10] [--json FILE]

Writers copy adapters into INCOMING while the guard is killed (-9) at random and started again. In the end every
good adapter must be in OUTGOING once, equal to what `csulora.correct` makes of it, and every broken one must be
refused there. All the while an observer looks for results that are there but not whole.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch

import csulora

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.0.mlp.down_proj": (48, 64)}
RANK = 4
SETTLE, PATIENCE = 0.4, 3.0


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    """Return a reproducible random matrix."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_subspace(directory: Path) -> Path:
    """Extract a subspace file of two tiny checkpoints."""
    for name, moved in (("base", 0.0), ("aligned", 0.1)):
        weights = {}
        for i, (module, (rows, columns)) in enumerate(MODULES.items()):
            change = gaussian(rows, RANK, seed=i + 10) @ gaussian(RANK, columns, seed=i + 20)
            weights[f"{module}.weight"] = gaussian(rows, columns, seed=i) + moved * change
        (directory / name).mkdir()
        safetensors.torch.save_file(weights, directory / name / "model.safetensors")
        (directory / name / "config.json").write_text('{"model_type": "llama"}')
    subspace = directory / "subspace.safetensors"
    csulora.extract(directory / "base", directory / "aligned", rank=RANK, output=subspace)
    return subspace


def make_adapter(directory: Path, seed: int, rank: int = RANK, settings: Mapping[str, object] | None = None) -> Path:
    """Write a PEFT adapter whose factors have a rank, and with settings that may say otherwise."""
    directory.mkdir()
    tensors = {}
    for i, (module, (rows, columns)) in enumerate(MODULES.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = gaussian(rank, columns, seed=100 * seed + i)
        tensors[f"base_model.model.{module}.lora_B.weight"] = gaussian(rows, rank, seed=100 * seed + i + 50)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(MODULES), **(settings or {})}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def with_nan(directory: Path, seed: int) -> None:
    """Make an adapter that holds a NaN."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)


def truncated(directory: Path, seed: int) -> None:
    """Make an upload that never finishes."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(directory: Path, seed: int) -> None:
    """Make an adapter without its weights."""
    (make_adapter(directory, seed) / "adapter_model.safetensors").unlink()


def linked(directory: Path, seed: int) -> None:
    """Make an adapter whose weights are a symbolic link to somewhere else."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    elsewhere = directory.parent / f".{directory.name}.safetensors"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def with_number_beyond_json(directory: Path, seed: int) -> None:
    """Make an adapter whose configuration holds a number that no float holds, in a field without effect."""
    file = make_adapter(directory, seed) / "adapter_config.json"
    file.write_text(file.read_text()[:-1] + ', "runtime_config": {"x": 1e999}}')


def nested(directory: Path, seed: int) -> None:
    """Make an adapter whose configuration would grow a thousandfold by indentation."""
    file = make_adapter(directory, seed) / "adapter_config.json"
    file.write_text(file.read_text()[:-1] + f', "auto_mapping": {{"x": {"[" * 900 + "]" * 900}}}}}')


def with_escapes(directory: Path, seed: int) -> None:
    """Make an adapter with a tensor whose name would forge lines of a log."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    tensors["x\nadapter-000: corrected, change 0.0%\x1b[2J" + "x" * 100_000] = tensors.pop(next(iter(tensors)))
    safetensors.torch.save_file(tensors, file)


def with_settings(**settings: object) -> Callable[[Path, int], object]:
    """Return what makes an adapter with further settings."""
    return lambda directory, seed: make_adapter(directory, seed, settings=settings)


BROKEN: tuple[Callable[[Path, int], object], ...] = (
    with_nan,
    truncated,
    without_weights,
    linked,
    with_number_beyond_json,
    nested,
    with_escapes,
    with_settings(use_dora=True),
    with_settings(use_dora="none"),
    with_settings(kasa_config={}),
    with_settings(ensure_weight_tying=""),
    with_settings(r=RANK + 1),
    with_settings(lora_dropout=2.0),
    with_settings(task_type="BOGUS"),
    with_settings(layers_to_transform=[]),
    with_settings(target_modules="((.*a)*.*)*_projection"),  # takes longer to match than it may
)
RANK_ABOVE_THE_MATRIX = 2000


def make_sources(directory: Path, count: int) -> tuple[list[Path], list[Path]]:
    """Make good and broken adapters, three in ten broken; of the good ones one in ten of a rank above the matrix."""
    good: list[Path] = []
    broken: list[Path] = []
    for seed in range(count):
        path = directory / f"adapter-{seed:03}"
        if seed % 10 in (2, 5, 8):
            BROKEN[len(broken) % len(BROKEN)](path, seed)
            broken.append(path)
        else:
            good.append(make_adapter(path, seed, RANK_ABOVE_THE_MATRIX if seed % 10 == 0 else RANK))
    return good, broken


def upload(sources: list[Path], incoming: Path, rng: random.Random) -> None:
    """Copy adapters one after the other: some at once, some in pieces with pauses, files in any order."""
    for source in sources:
        target = incoming / source.name
        slow = rng.random() < 0.3
        target.mkdir()
        for file in rng.sample(sorted(source.iterdir()), k=len(list(source.iterdir()))):
            if file.is_symlink():
                (target / file.name).symlink_to(file.resolve())
                continue
            data = file.read_bytes()
            pieces = rng.randint(2, 5) if slow else 1
            with (target / file.name).open("wb") as out:
                for i in range(pieces):
                    out.write(data[len(data) * i // pieces : len(data) * (i + 1) // pieces])
                    out.flush()
                    if slow:
                        time.sleep(rng.uniform(0.0, 1.5 * SETTLE))
        time.sleep(rng.uniform(0.0, 0.1))


@dataclass
class Observer(threading.Thread):
    """Watches OUTGOING for adapters that are there but not whole, and counts how often each one appeared."""

    outgoing: Path
    partial: list[str] = field(default_factory=list)
    appeared: Counter[str] = field(default_factory=Counter)
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
            now = {p.name: p.stat().st_ino for p in self.outgoing.glob("[!.]*") if p.is_dir()}
            for name in now.keys() - present.keys() | {n for n in now if now[n] != present.get(n)}:
                self.appeared[name] += 1
                try:
                    csulora.load_adapter(self.outgoing / name)
                    json.loads((self.outgoing / name / "csulora_report.json").read_text())
                except (csulora.CsuloraError, OSError, ValueError) as error:
                    self.partial.append(f"{name}: {error}")
            present = now


def start_guard(incoming: Path, outgoing: Path, subspace: Path) -> subprocess.Popen[bytes]:
    """Start the real command."""
    options = ["--watch", "--settle", str(SETTLE), "--patience", str(PATIENCE), "--quiet"]
    command = [
        sys.executable,
        "-m",
        "csulora",
        "guard",
        str(incoming),
        str(outgoing),
        "--subspace",
        str(subspace),
        "--policy",
        "csulora",
        *options,
    ]
    return subprocess.Popen(command)


def all_decided(outgoing: Path, sources: list[Path]) -> bool:
    """Whether every adapter has a result."""
    return all(
        (outgoing / source.name).is_dir() or (outgoing / f"{source.name}.refused.json").is_file() for source in sources
    )


def is_correct(source: Path, result: Path, subspace: csulora.Subspace) -> bool:
    """Whether a result is what `csulora.correct` makes of its source."""
    expected, _ = csulora.correct(csulora.load_adapter(source), subspace, csulora.Policy.csulora())
    found = csulora.load_adapter(result)
    return found.modules.keys() == expected.modules.keys() and all(
        torch.equal(found.modules[name].b, module.b) and torch.equal(found.modules[name].a, module.a)
        for name, module in expected.modules.items()
    )


@dataclass
class Outcome:
    """What a soak test found; it passed if all were decided, the lists are empty and no guard ended by itself."""

    adapters: int
    broken: int
    kills: int
    seconds: float
    decided: bool
    wrong: list[str]
    let_through: list[str]
    partial: list[str]
    made_more_than_once: list[str]
    ended_by_itself: int
    clean_exit: bool

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong."""
        bad = self.wrong or self.let_through or self.partial or self.made_more_than_once or self.ended_by_itself
        return self.decided and self.clean_exit and not bad


def soak(work: Path, adapters: int, writers: int, kills: int, seed: int = 0, limit: float = 600.0) -> Outcome:
    """Run the test in the empty directory ``work`` for at most ``limit`` seconds."""
    rng, start, ended_by_itself = random.Random(seed), time.monotonic(), 0
    incoming, outgoing, sources = work / "incoming", work / "outgoing", work / "sources"
    for directory in (incoming, outgoing, sources):
        directory.mkdir()
    subspace = make_subspace(work)
    good, broken = make_sources(sources, adapters)
    everything = rng.sample(good + broken, adapters)
    observer = Observer(outgoing)
    threads = [
        threading.Thread(target=upload, args=(everything[i::writers], incoming, random.Random(seed + i)))
        for i in range(writers)
    ]
    guard = start_guard(incoming, outgoing, subspace)
    for thread in threads:
        thread.start()
    for _ in range(kills):
        # Not before it works: else only its start would be tested.
        before = len(list(outgoing.glob("[!.]*")))
        while len(list(outgoing.glob("[!.]*"))) == before and not all_decided(outgoing, everything):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        guard.send_signal(signal.SIGKILL)
        ended_by_itself += guard.wait() != -signal.SIGKILL
        guard = start_guard(incoming, outgoing, subspace)
    for thread in threads:
        thread.join()
    while not all_decided(outgoing, everything) and time.monotonic() - start < limit:
        time.sleep(0.1)
    time.sleep(2 * SETTLE)  # anything made twice would be made now
    ended_by_itself += guard.poll() is not None
    guard.send_signal(signal.SIGTERM)
    clean_exit = guard.wait(30) == 0
    observer.finished.set()
    observer.join()
    opened = csulora.Subspace.open(subspace)
    return Outcome(
        adapters=adapters,
        broken=len(broken),
        kills=kills,
        seconds=round(time.monotonic() - start, 1),
        decided=all_decided(outgoing, everything),
        wrong=[path.name for path in good if not is_correct(path, outgoing / path.name, opened)],
        let_through=[path.name for path in broken if (outgoing / path.name).exists()],
        partial=observer.partial + [path.name for path in outgoing.glob(".*.csulora-tmp")],
        ended_by_itself=ended_by_itself,
        made_more_than_once=[name for name, times in observer.appeared.items() if times > 1],
        clean_exit=clean_exit,
    )


def main() -> None:
    """Run the soak test; exit 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        outcome = soak(Path(work), arguments.adapters, arguments.writers, arguments.kills)
    text = json.dumps(asdict(outcome) | {"passed": outcome.passed}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    sys.exit(0 if outcome.passed else 1)


if __name__ == "__main__":
    main()
