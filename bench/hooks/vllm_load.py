"""What the guard costs vLLM: plain with corrected adapters beside guarded with raw ones, in one run.

    .venv-vllm/bin/python bench/hooks/vllm_load.py [--adapters 30] [--loads 50] [--rounds 3]

Both servers run at the same time, serve the efficacy fixture's model and have room for one adapter. Requests go to one
and the other in turn. Timed are `/v1/load_lora_adapter`, the first reply, a warm reply, and the reply that has to load
the adapter again. Then one client loads further adapters while another asks for the base model's replies: theirs are
the `others`.

Writes bench/results/speed/vllm_load.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
for folder in ("tests/vllm", "tests/servers", "bench/speed"):
    sys.path.insert(0, str(REPOSITORY / folder))

import measuring  # noqa: E402
import torch  # noqa: E402

import csulora  # noqa: E402

# Of the tests, which type checkers do not see.
adapters: Any = importlib.import_module("adapters")
vllm_server: Any = importlib.import_module("vllm_server")

TIMED = ("load", "first reply", "warm reply", "reply after eviction", "others")
LONE = ["--max-loras", "1", "--max-cpu-loras", "1"]
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

Times = dict[str, dict[str, list[float]]]


def elapsed(call: Callable[[], object]) -> float:
    """Return the milliseconds of one call."""
    return 1000 * measuring.seconds(call)


def make(root: Path, count: int) -> tuple[Path, dict[str, list[Path]]]:
    """Write a subspace file, and adapters raw and corrected."""
    file = root / "subspace.safetensors"
    adapters.csulora("extract", adapters.FIXTURE / "base", adapters.FIXTURE / "aligned", "-o", file, "--rank", 8)
    subspace = csulora.Subspace.open(file)
    generator = torch.Generator().manual_seed(0)

    def noisy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t + 0.1 * t.std() * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}

    paths: dict[str, list[Path]] = {"plain": [], "guarded": []}
    for i in range(count):
        raw, corrected = adapters.write(root / f"raw{i}", noisy), root / f"corrected{i}"
        fixed, _ = csulora.correct(csulora.load_adapter(raw), subspace, csulora.Policy.csulora())
        csulora.save_adapter(fixed, corrected)
        paths["guarded"].append(raw)
        paths["plain"].append(corrected)
    return file, paths


def load(server: Any, name: str, path: Path) -> None:
    """Load an adapter, or stop."""
    status, text = server.load(name, path)
    if status != 200:
        raise SystemExit(f"{path} was not loaded: {text}")


def measure_replies(servers: dict[str, Any], paths: dict[str, list[Path]], count: int, times: Times) -> None:
    """Time loads and replies adapter by adapter, on one server and the other in turn."""
    order = random.Random(0)
    for i in range(count):
        answers = {}
        for kind in order.sample(list(servers), len(servers)):
            server, name = servers[kind], f"a{i}"
            times[kind]["load"].append(elapsed(partial(load, server, name, paths[kind][i])))
            times[kind]["first reply"].append(elapsed(partial(server.ask, name)))
            for _ in range(3):
                times[kind]["warm reply"].append(elapsed(partial(server.ask, name)))
            answers[kind] = server.ask(name)["tokens"]
        if answers["plain"] != answers["guarded"]:
            raise SystemExit(f"adapter {i}: the servers answer {answers}")
    for i in range(count):
        for kind in order.sample(list(servers), len(servers)):
            times[kind]["reply after eviction"].append(elapsed(partial(servers[kind].ask, f"a{i}")))


def measure_others(server: Any, model: str, name: str, paths: list[Path]) -> list[float]:
    """Return how long replies of the base model take while adapters are loaded."""
    done, found = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            found.append(elapsed(lambda: server.ask(model)))

    client = threading.Thread(target=ask)
    client.start()
    for i, path in enumerate(paths):
        load(server, f"{name}{i}", path)
    done.set()
    client.join()
    return found


def measure_servers(root: Path, counts: argparse.Namespace) -> Times:
    """Return the milliseconds by server and what was timed."""
    file, paths = make(root, counts.adapters + counts.loads * counts.rounds)
    model = str(adapters.FIXTURE / "aligned")
    variables = {"CSULORA_SUBSPACE": str(file), "CSULORA_POLICY": "csulora"}
    times: Times = {kind: defaultdict(list) for kind in paths}
    with ExitStack() as stack:
        plain = stack.enter_context(
            vllm_server.running([*vllm_server.PLAIN, model, *LONE], root / "plain.log", VLLM_PLUGINS="")
        )
        guarded = stack.enter_context(
            vllm_server.running([*vllm_server.GUARDED, model, *LONE], root / "guarded.log", **variables)
        )
        servers = {"plain": plain, "guarded": guarded}
        for server in servers.values():
            server.ask(model)
        measure_replies(servers, paths, counts.adapters, times)
        for turn in range(counts.rounds):
            first = counts.adapters + turn * counts.loads
            for kind in random.Random(turn).sample(list(servers), len(servers)):
                chosen = paths[kind][first : first + counts.loads]
                times[kind]["others"] += measure_others(servers[kind], model, f"round{turn}-", chosen)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Describe times in milliseconds."""
    ranks = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(ranks[49], 2), "p99": round(ranks[98], 2), "requests": len(values)}


def main() -> None:
    """Measure everything and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=30)
    parser.add_argument("--loads", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    counts = parser.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as root:
        times = measure_servers(Path(root), counts)
    figures = {name: {kind: summary(times[kind][name]) for kind in times} for name in TIMED}
    for name in TIMED:
        plain, guarded = figures[name]["plain"], figures[name]["guarded"]
        figures[name]["ratio"] = {rank: round(guarded[rank] / plain[rank], 3) for rank in ("p50", "p99")}
    results: dict[str, object] = {"milliseconds": figures}
    measuring.save("vllm_load", results | {"wall_seconds": round(time.time() - start)})
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
