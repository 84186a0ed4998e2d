"""vLLM's own classes on the CPU, as far as no device is needed, and every way by which an adapter comes to them.

The model, its LoRA layers, the LoRA managers, the engines and the server's list of adapters are vLLM's. In place of the
engine's core, which needs a device to generate, stands `Core`: it loads adapters and applies their layers.
"""

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.model_loader import get_model
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.worker.worker_base import WorkerBase

PROMPT = "how do i"
OPTIONS = SamplingParams(temperature=0, max_tokens=8)
TOKENS = 3

Effects = dict[str, list[float]]


class Core:
    """Stands in for the engine's core and its worker."""

    def __init__(self, config: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
        self.manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        self.manager.create_lora_manager(model, config)
        self.loaded = 0
        self.resources = SimpleNamespace(engine_dead=False)

    def add_lora(self, request: LoRARequest) -> bool:
        self.loaded = request.lora_int_id
        return self.manager.add_adapter(request)

    async def add_lora_async(self, request: LoRARequest) -> bool:
        return self.add_lora(request)

    def add_request(self, request: Any) -> None:
        self.add_lora(request.lora_request)

    async def add_request_async(self, request: Any) -> None:
        self.add_request(request)

    def collective_rpc(self, method: str, *_: Any) -> list[Any]:
        return [getattr(WorkerBase, method)(None)]

    async def collective_rpc_async(self, method: str, *_: Any) -> list[Any]:
        return self.collective_rpc(method)

    async def call_utility_async(self, method: str) -> Any:
        return getattr(EngineCore, method)(None)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return self.get_supported_tasks()

    async def get_output_async(self) -> None:
        await asyncio.Event().wait()

    def reset_mm_cache(self) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None: ...

    def effects(self) -> Effects:
        """Return what each linear layer makes of a fixed input with the adapter that was loaded last."""
        adapters = self.manager._adapter_manager
        adapters.set_adapter_mapping(LoRAMapping((self.loaded,) * TOKENS, (self.loaded,), is_prefill=True))
        layers = {n: layer for n, layer in adapters.modules.items() if isinstance(layer, BaseLinearLayerWithLoRA)}
        found = {}
        for name, layer in layers.items():
            fixed = torch.randn(TOKENS, layer.input_size, generator=torch.Generator().manual_seed(0))
            output = layer(fixed)
            found[name] = (output[0] if isinstance(output, tuple) else output).flatten().tolist()
        return found

    def forget(self) -> None:
        self.manager.remove_all_adapters()
        self.loaded = 0


class Routes:
    """Every route of one process by which an adapter comes to the engine."""

    def __init__(self, config: Any, core: Core) -> None:
        self.core, self.requests = core, 0
        EngineCoreClient.make_client = staticmethod(lambda **_: core)
        EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: core)
        executor = Executor.get_class(config)
        self.engine = LLMEngine(config, executor, log_stats=False, multiprocess_mode=True)
        self.async_engine = AsyncLLM(config, executor, log_stats=False, start_engine_loop=False)

    def models(self, *modules: LoRAModulePath) -> OpenAIServingModels:
        base = [BaseModelPath(name="base", model_path="base")]
        return OpenAIServingModels(self.async_engine, base, lora_modules=list(modules))

    def request(self, path: str) -> LoRARequest:
        self.requests += 1
        return LoRARequest(f"adapter-{self.requests}", self.requests, path)

    async def add_request(self, path: str) -> None:
        self.engine.add_request(f"request-{self.requests}", PROMPT, OPTIONS, lora_request=self.request(path))

    async def add_lora(self, path: str) -> None:
        self.engine.add_lora(self.request(path))

    async def reload_after_eviction(self, path: str) -> None:
        """The engine has room for one adapter, and what it loads again is gone from where it lay."""
        with tempfile.TemporaryDirectory() as place:
            request = self.request(str(shutil.copytree(path, Path(place) / "adapter")))
            self.engine.add_request(f"first-{self.requests}", PROMPT, OPTIONS, lora_request=request)
        await self.add_request(path)
        assert request.lora_int_id not in self.core.manager.list_adapters()
        self.engine.add_request(f"again-{self.requests}", PROMPT, OPTIONS, lora_request=request)

    async def async_add_request(self, path: str) -> None:
        request = self.request(path)
        await self.async_engine.add_request(f"async-{self.requests}", PROMPT, OPTIONS, lora_request=request)

    async def async_add_lora(self, path: str) -> None:
        await self.async_engine.add_lora(self.request(path))

    async def load_lora_adapter(self, path: str) -> None:
        raise_error(await self.models().load_lora_adapter(LoadLoRAAdapterRequest(lora_name="a", lora_path=path)))

    async def load_in_place(self, path: str) -> None:
        request = LoadLoRAAdapterRequest(lora_name="a", lora_path=path, load_inplace=True)
        raise_error(await self.models().load_lora_adapter(request))

    async def resolve_lora(self, path: str) -> None:
        raise_error(await self.models().resolve_lora(Path(path).name))

    async def init_static_loras(self, path: str) -> None:
        await self.models(LoRAModulePath(name="a", path=path)).init_static_loras()


FRONT_END = ("add_request", "add_lora", "reload_after_eviction", "async_add_request", "async_add_lora")
FRONT_END += ("load_lora_adapter", "load_in_place", "resolve_lora", "init_static_loras")


def raise_error(answer: Any) -> None:
    if isinstance(answer, ErrorResponse):
        raise ValueError(f"{answer.error.code}: {answer.error.message}")


def worker_ways(core: Core) -> dict[str, Callable[[str], Any]]:
    """Ways past the front end by which a worker would load an adapter."""

    def from_local_checkpoint(path: str) -> Any:
        return LoRAModel.from_local_checkpoint(path, set(), PEFTHelper.from_local_dir(path, None), device="cpu")

    def from_lora_tensors(path: str) -> Any:
        return LoRAModel.from_lora_tensors(1, {}, PEFTHelper.from_local_dir(path, None), device="cpu")

    return {
        "add_adapter": lambda path: core.add_lora(LoRARequest("a", 1, path)),
        "set_active_adapters": lambda path: core.manager.set_active_adapters({LoRARequest("a", 1, path)}, None),
        "from_local_checkpoint": from_local_checkpoint,
        "from_lora_tensors": from_lora_tensors,
    }
