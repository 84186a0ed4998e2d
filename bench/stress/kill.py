"""Kills csulora with -9 at random moments, and looks at what is left.

    python bench/stress/kill.py [--kills 300] [--seed 0] [--json FILE]

Each operation runs in a process of its own that is killed at a random moment of the time it usually takes. After
every kill its output must be absent, or complete and equal to that of an undisturbed run; and after the next run
that is left alone it must be equal, with nothing else beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from inputs import make_adapter, make_subspace

import csulora
from csulora import Policy
from csulora.cli import app as cli
from csulora.hooks.llama_cpp.cache import CorrectedCache
from csulora.io.files import to_json
from csulora.models.gguf_base import BaseModel
from csulora.serving.gate import Gate
from csulora.serving.guard.uploads import RECORD_FILE

WIDTH, LAYERS, RANK = 192, 2, 8
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": (WIDTH, WIDTH)
    for layer in range(LAYERS)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS,
    "vocab_size": WIDTH,
    "tie_word_embeddings": False,
}


def make_inputs(directory: Path) -> None:
    """Write two checkpoints, their subspace file, and a directory of adapters."""
    make_subspace(directory, SHAPES, RANK, CONFIG)
    for seed in range(3):
        make_adapter(directory / "incoming" / f"adapter-{seed}", SHAPES, seed, RANK)


def command(*arguments: str | Path) -> None:
    """Run a csulora command line in this process."""
    sys.argv = ["csulora", *map(str, arguments), "--quiet"]
    cli.main()


def operations(inputs: Path) -> dict[str, Callable[[Path], None]]:
    """Everything that writes, as a function of the directory it writes into."""
    subspace, adapter = inputs / "subspace.safetensors", inputs / "incoming" / "adapter-0"
    correction = ("--subspace", subspace, "--policy", "csulora")

    def cache(out: Path) -> None:
        base = BaseModel.open(inputs / "base")
        CorrectedCache(out / "cache").corrected(adapter, base, Gate.open(subspace, Policy.csulora(1.0)))

    def export(out: Path) -> None:
        command("export", adapter, "-o", out / "lora.gguf", "--base-model", inputs / "base")

    return {
        "extract": lambda out: command(
            "extract", inputs / "base", inputs / "aligned", "-o", out / "subspace", "--rank", "8"
        ),
        "correct": lambda out: command("correct", adapter, *correction, "-o", out / "corrected"),
        "export": export,
        "guard": lambda out: command(
            "guard", inputs / "incoming", out / "outgoing", *correction, "--settle", "0", "--patience", "0"
        ),
        "cache": cache,
    }


def run(operation: Callable[[Path], None], out: Path, kill_after: float | None = None) -> bool:
    """Run an operation in a child; return whether it was killed. Raises if it fails by itself."""
    child = os.fork()
    if child == 0:
        try:
            operation(out)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the operation ended with {status}")
    return status != 0


def contents(out: Path) -> dict[str, bytes]:
    """Return every finished file by its path; what is hidden or partial is no output."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: _without_id(path) for name, path in files.items() if not is_unfinished(name)}


def _without_id(path: Path) -> bytes:
    """Return a file's bytes; of the guard's record all but the id of the decision, which is random."""
    if path.name != RECORD_FILE:
        return path.read_bytes()
    return to_json(json.loads(path.read_bytes()) | {"decision": ""}).encode()


def is_unfinished(name: str) -> bool:
    """Whether a path is that of a workplace, of a partial run or of a lock."""
    return any(part.startswith(".") or part.endswith(".partial") for part in Path(name).parts)


def leftovers(out: Path) -> list[str]:
    """Return what a finished run must not leave: workplaces and partial runs."""
    paths = [str(path.relative_to(out)) for path in out.rglob("*")]
    return [path for path in paths if path.endswith((".csulora-tmp", ".partial"))]


@dataclass
class Tally:
    """What was seen of one operation."""

    seconds: float
    kills: int = 0  # that came before the end
    absent: int = 0  # no output after the kill
    complete: int = 0  # whole output after the kill
    left_something: int = 0  # workplaces or partial runs were there until the next run
    lost: list[str] = field(default_factory=list)  # anything that broke a promise


def torture(operation: Callable[[Path], None], directory: Path, kills: int, rng: random.Random) -> Tally:
    """Kill an operation at random moments, and compare."""
    out = directory / "undisturbed"
    out.mkdir()
    start = time.perf_counter()
    run(operation, out)
    tally, expected = Tally(time.perf_counter() - start), contents(out)
    attempts = 0
    while tally.kills < kills:
        attempts += 1
        out = directory / f"attempt-{attempts}"
        out.mkdir()
        moment = rng.uniform(0, tally.seconds)
        if run(operation, out, moment):
            tally.kills += 1
            found = contents(out)
            whole = whole_outputs(found)
            tally.absent += not whole
            tally.complete += bool(whole)
            tally.left_something += bool(leftovers(out))
            tally.lost += [
                f"{name} after a kill at {moment:.4f} s" for name in found if found[name] != expected.get(name)
            ]
            tally.lost += [f"{output} is not whole" for output in whole if not is_whole(output, found, expected)]
        run(operation, out)
        if contents(out) != expected or leftovers(out):
            tally.lost.append(f"the run after a kill at {moment:.4f} s differs: {leftovers(out)}")
        shutil.rmtree(out)
    return tally


def whole_outputs(found: dict[str, bytes]) -> set[str]:
    """Return the directories that hold files, and the files that lie in none of them."""
    return {str(Path(name).parent) if Path(name).parent != Path() else name for name in found}


def is_whole(output: str, found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether an output directory holds every file that it should hold; a directory of outputs may lack some."""
    if output.endswith(("outgoing", "cache")):
        return True
    return all(name in found for name in expected if name == output or str(Path(name).parent) == output)


def main() -> None:
    """Run every operation's share of the kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name, "inputs")
        inputs.mkdir()
        make_inputs(inputs)
        tallies = {}
        todo = operations(inputs)
        for i, (operation, function) in enumerate(todo.items()):
            share = (arguments.kills + i) // len(todo)
            Path(name, operation).mkdir()
            tallies[operation] = torture(function, Path(name, operation), share, rng)
            print(operation, tallies[operation], flush=True)
    if arguments.json:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "csulora": csulora.__version__}
        document = {
            "machine": machine,
            "seed": arguments.seed,
            "operations": {k: asdict(v) for k, v in tallies.items()},
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if any(tally.lost for tally in tallies.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
