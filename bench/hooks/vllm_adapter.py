"""An adapter of Llama-3-8B's shape through vLLM's own loading function: plain beside guarded, in one run.

    .venv-vllm/bin/python bench/hooks/vllm_adapter.py [--adapters 6]

One process each has vLLM's model, its LoRA layers and its worker's manager, with room for one adapter. The model's
weights are never written to: loading an adapter reads their shapes alone. The plain process loads corrected adapters,
the guarded one decides on the raw ones and loads what it publishes, in turn. Each adapter is loaded once, and again
after it was evicted. Timed is `add_adapter` of vLLM's manager: reading, packing, and filling the layers' buffers. What
is read lies in the system's memory: each file is read once just before.

Beside them stand two parts of the guard's work alone, in a guarded process: hashing the weights' bytes, which one core
does, and correcting in memory on all of them. No first load can take less than plain's and these, spread over the
cores: that is the floor.

Writes bench/results/speed/vllm_adapter.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench" / "speed"))

import measuring  # noqa: E402
import shapes  # noqa: E402
import torch  # noqa: E402

import csulora  # noqa: E402

SHAPE = shapes.SHAPES["llama-3-8b"]
KINDS = ("plain", "guarded")
TIMED = ("first load", "load after eviction")
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}

_load: Callable[[int, str], Path]  # of this process
_manager: Any
_loaded: dict[int, Path] = {}  # number -> what vLLM reads


def make_model(directory: Path) -> Path:
    """Write the configuration of the model; there are no weights."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": SHAPE.width,
        "intermediate_size": SHAPE.hidden,
        "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.key_value_heads,
        "vocab_size": SHAPE.vocabulary,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def set_up(kind: str, model: Path, subspace: Path) -> None:
    """Make vLLM's manager of LoRA layers in this process, guarded or not."""
    global _load, _manager
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=1,
        max_lora_rank=shapes.RANK,
        enforce_eager=True,
        dtype="bfloat16",
        distributed_executor_backend="uni",
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free.getsockname()[1] + 1}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        network = initialize_model(config)
        _manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), network.embedding_modules)
        _manager.create_lora_manager(network, config)
    published = _guarded(config.lora_config, subspace) if kind == "guarded" else lambda number, path: Path(path)

    def load(number: int, path: str) -> Path:
        directory = published(number, path)
        _manager.add_adapter(LoRARequest(f"adapter-{number}", number, str(directory)))
        return directory

    _load = load


def _guarded(config: Any, subspace: Path) -> Callable[[int, str], Path]:
    """Put the guard into this process; return what the front end does with an adapter."""
    from csulora.hooks.vllm.patches import install
    from csulora.serving.admission import Admission, Terms
    from csulora.serving.gate import Gate

    admission = Admission(Gate.open(subspace, "csulora", route="vllm"))
    install(admission)
    terms = Terms(config.lora_dtype, config.max_lora_rank)
    return lambda number, path: admission.admit((number, path), lambda: Path(path), terms, False)


def timed_load(number: int, path: str) -> float:
    """Load an adapter in this process, whose files the system holds in memory; return the milliseconds."""
    measuring.read_files(_loaded.get(number, Path(path)) / "adapter_model.safetensors")
    start = time.perf_counter()
    _loaded[number] = _load(number, path)
    return 1000 * (time.perf_counter() - start)


def loaded_sum(number: int) -> float:
    """Return a number that follows from the adapter which this process has loaded."""
    loras = _manager._adapter_manager.get_adapter(number).loras
    packed = [factor for lora in loras.values() for factor in (lora.lora_a, lora.lora_b)]
    factors = [part for factor in packed for part in (factor if isinstance(factor, list) else [factor])]
    return float(sum(part.double().square().sum().item() for part in factors))


def parts(path: str, subspace: str, repetitions: int) -> dict[str, float]:
    """Return the milliseconds of what the guard cannot do without, each alone in this process."""
    opened, policy, adapter = csulora.Subspace.open(subspace), csulora.Policy.csulora(), csulora.load_adapter(path)
    content = Path(path, "adapter_model.safetensors").read_bytes()
    times = measuring.interleaved(
        {
            "hashing": lambda: hashlib.sha256(content).digest(),
            "correcting": lambda: csulora.correct(adapter, opened, policy),
        },
        repetitions,
    )
    return {name: 1000 * found["median"] for name, found in times.items()}


def make(root: Path, count: int) -> dict[str, list[Path]]:
    """Write a subspace file, and adapters raw and corrected."""
    subspace = shapes.make_subspace(SHAPE, root / "subspace.safetensors")
    paths: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for i in range(count):
        raw, corrected = shapes.make_adapter(SHAPE, root / f"raw{i}", torch.bfloat16), root / f"corrected{i}"
        fixed, _ = csulora.correct(csulora.load_adapter(raw), subspace, csulora.Policy.csulora())
        csulora.save_adapter(fixed, corrected)
        paths["guarded"].append(raw)
        paths["plain"].append(corrected)
    return paths


def measure(root: Path, count: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Return the milliseconds by what was timed and process, without the first adapter, and those of the parts."""
    paths, order = make(root, count + 1), random.Random(0)
    arguments = (make_model(root / "model"), root / "subspace.safetensors")
    times: dict[str, dict[str, list[float]]] = {what: {kind: [] for kind in KINDS} for what in TIMED}
    pools = {
        kind: ProcessPoolExecutor(1, get_context("spawn"), initializer=set_up, initargs=(kind, *arguments))
        for kind in KINDS
    }
    for what in TIMED:
        for i in range(count + 1):
            sums = {}
            for kind in order.sample(KINDS, len(KINDS)):
                milliseconds = pools[kind].submit(timed_load, i + 1, str(paths[kind][i])).result()
                sums[kind] = pools[kind].submit(loaded_sum, i + 1).result()
                if i:
                    times[what][kind].append(milliseconds)
            if sums["plain"] != sums["guarded"]:
                raise SystemExit(f"adapter {i}: the processes loaded {sums}")
    alone = pools["guarded"].submit(parts, str(paths["guarded"][0]), str(root / "subspace.safetensors"), count).result()
    for pool in pools.values():
        pool.shutdown()
    return times, alone


def main() -> None:
    """Measure and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=6)
    count = parser.parse_args().adapters
    with tempfile.TemporaryDirectory() as root:
        times, alone = measure(Path(root), count)
    figures: dict[str, Any] = {
        what: {kind: measuring.summary(values) for kind, values in found.items()} for what, found in times.items()
    }
    for what in TIMED:
        plain, guarded = (figures[what][kind]["median"] for kind in KINDS)
        figures[what]["ratio"] = round(guarded / plain, 3)
    plain = figures["first load"]["plain"]["median"]
    floor = plain + alone["correcting"] + alone["hashing"] / torch.get_num_threads()
    results: dict[str, Any] = {
        "shape": "llama-3-8b",
        "rank": shapes.RANK,
        "milliseconds": figures,
        "alone": alone,
        "floor": {"guarded": floor, "ratio": round(floor / plain, 3)},
        "hashing_ratio": round((plain + alone["hashing"]) / plain, 3),
    }
    measuring.save("vllm_adapter", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
