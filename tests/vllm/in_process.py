"""Asks vLLM's own classes for adapters: first unguarded, for reference, then guarded. Prints JSON.

    python tests/vllm/in_process.py REQUEST.json

The request names the model and the adapters. The guard is configured by its environment variables.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_PLUGINS": ""}

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform


async def outcome(core: Any, action: Callable[[], Any]) -> Any:
    """Return the effects of what an action loaded, or why it loaded nothing."""
    core.forget()
    try:
        done = action()
        if asyncio.iscoroutine(done):
            await done
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return core.effects()


async def examine(request: dict[str, Any], config: Any) -> dict[str, Any]:
    from routes import FRONT_END, Core, Routes, worker_ways
    from vllm.lora.request import LoRARequest

    core = Core(config)
    plain = {p: await outcome(core, lambda p=p: core.add_lora(LoRARequest("a", 1, p))) for p in request["plain"]}

    from csulora.hooks import vllm as hook

    hook.activate()
    routes = Routes(config, core)
    paths = [*request["guarded"], *request["bad"]]
    guarded = {
        route: {p: await outcome(core, lambda p=p, route=route: getattr(routes, route)(p)) for p in paths}
        for route in FRONT_END
    }
    worker = {
        name: {p: await outcome(core, lambda p=p, way=way: way(p)) for p in request["guarded"]}
        for name, way in worker_ways(core).items()
    }
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    return {"versions": versions, "plain": plain, "guarded": guarded, "worker": worker}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    # The wheel for GPUs finds no platform where there is none, and its modules keep the one that they find.
    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=request["model"],
        enable_lora=True,
        max_lora_rank=16,
        enforce_eager=True,
        dtype="float32",
        distributed_executor_backend="uni",
    ).create_engine_config()
    with set_current_vllm_config(config), torch.inference_mode():
        results = asyncio.run(examine(request, config))
    print("RESULTS", json.dumps(results), flush=True)
    os._exit(0)  # engines that were never started wait for their core's end


if __name__ == "__main__":
    main()
