"""Where vLLM 0.32 is made to ask the guard.

Front end: a refused adapter is answered with its reason, before the engine hears of it. Worker: an adapter is loaded
from a directory that holds the corrected one; any other way of making LoRA weights is closed. Scheduler: cached
prefixes of guarded adapters have keys of their own. All processes: they can be asked whether they are guarded.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
from vllm.config.lora import LoRAConfig
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.worker_base import WorkerBase

from csulora.errors import CsuloraError, InputError, RefusedError
from csulora.hooks import check_signature
from csulora.hooks.vllm.admission import Admission
from csulora.hooks.vllm.readiness import PROBE, check_model, check_ready, check_ready_async

# Set in a worker while vLLM loads what was corrected.
_corrected: ContextVar[bool] = ContextVar("corrected", default=False)

# Why the last adapter that the current task wanted to add was refused; vLLM drops the reason on one of its routes.
_refusal: ContextVar[str | None] = ContextVar("refusal", default=None)

_Function = Callable[..., Any]


def install(admission: Admission) -> None:
    """Put the guard into this process.

    Raises:
        HostError: a function that is replaced does not look as expected; nothing was replaced.
    """
    _check_signatures()
    fingerprint = admission.gate.fingerprint

    InputProcessor._validate_lora = _validate_lora(admission, InputProcessor._validate_lora)
    LLMEngine.__init__ = _engine_init(admission, LLMEngine.__init__)
    AsyncLLM.__init__ = _checking_model(admission, AsyncLLM.__init__)
    LLMEngine.add_lora = _add_lora(admission, LLMEngine.add_lora)
    AsyncLLM.add_lora = _add_lora_async(admission, AsyncLLM.add_lora)
    OpenAIServingModels.load_lora_adapter = _load_lora_adapter(OpenAIServingModels.load_lora_adapter)
    OpenAIServingModels.resolve_lora = _resolve_lora(OpenAIServingModels.resolve_lora)
    OpenAIServingModels.init_static_loras = _init_static_loras(admission, OpenAIServingModels.init_static_loras)

    WorkerLoRAManager._load_adapter = _load_adapter(admission, WorkerLoRAManager._load_adapter)
    for name in ("from_local_checkpoint", "from_lora_tensors"):
        setattr(LoRAModel, name, classmethod(_closed(vars(LoRAModel)[name].__func__)))

    kv_cache_utils._gen_lora_extra_hash_keys = _cache_keys(fingerprint, kv_cache_utils._gen_lora_extra_hash_keys)

    for process in (EngineCore, WorkerBase):
        setattr(process, PROBE, lambda self: fingerprint)


def register_resolver(adapters: str | None) -> None:
    """Let the subdirectories of ``adapters`` be asked for by name.

    Raises:
        InputError: it is no directory.
    """
    if not adapters:
        return
    directory = Path(adapters)
    if not directory.is_dir():
        raise InputError(f"{adapters}: no such directory (CSULORA_ADAPTERS)")
    LoRAResolverRegistry.register_resolver("csulora", DirectoryResolver(directory))


class DirectoryResolver(LoRAResolver):  # type: ignore[misc]
    """Finds an adapter by the name of its directory."""

    def __init__(self, directory: Path) -> None:
        """Look for adapters in ``directory``."""
        self.directory = directory

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request for an adapter, or None if there is no directory of that name."""
        path = self.directory / lora_name
        if path.parent != self.directory or lora_name in ("", ".", "..") or not path.is_dir():
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))  # vLLM sets the id


def _check_signatures() -> None:
    check_signature(InputProcessor._validate_lora, "self", "lora_request")
    check_signature(LLMEngine.__init__, "self", "vllm_config")
    check_signature(AsyncLLM.__init__, "self", "vllm_config")
    check_signature(LLMEngine.add_lora, "self", "lora_request")
    check_signature(AsyncLLM.add_lora, "self", "lora_request")
    check_signature(OpenAIServingModels.load_lora_adapter, "self", "request", "base_model_name")
    check_signature(OpenAIServingModels.resolve_lora, "self", "lora_name")
    check_signature(OpenAIServingModels.init_static_loras, "self")
    check_signature(WorkerLoRAManager._load_adapter, "self", "lora_request")
    check_signature(LoRAModel.from_local_checkpoint, "lora_dir", "expected_lora_modules", "peft_helper")
    check_signature(LoRAModel.from_lora_tensors, "lora_model_id", "tensors", "peft_helper", "device", "dtype")
    check_signature(kv_cache_utils._gen_lora_extra_hash_keys, "request")


def _local(request: LoRARequest) -> Path:
    return Path(get_adapter_absolute_path(request.lora_path))


def _identity(request: LoRARequest) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path


def _check(admission: Admission, request: LoRARequest, config: LoRAConfig) -> None:
    try:
        admission.check(
            _identity(request), _local(request), config.lora_dtype, config.max_lora_rank, request.load_inplace
        )
    except CsuloraError as error:
        _refusal.set(str(error))
        raise VLLMValidationError(str(error)) from error


def _validate_lora(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def validate_lora(self: Any, lora_request: LoRARequest | None) -> None:
        original(self, lora_request)
        if lora_request is not None:
            _check(admission, lora_request, self.lora_config)

    return validate_lora


def _engine_init(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        check_ready(self, admission.gate)

    return _checking_model(admission, init)


def _checking_model(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **options: Any) -> None:
        check_model(vllm_config.model_config.model, admission.gate)
        original(self, vllm_config, *args, **options)

    return init


def _add_lora(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def add_lora(self: Any, lora_request: LoRARequest) -> Any:
        _check(admission, lora_request, self.vllm_config.lora_config)
        return original(self, lora_request)

    return add_lora


def _add_lora_async(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    async def add_lora(self: Any, lora_request: LoRARequest) -> Any:
        try:
            await asyncio.to_thread(_check, admission, lora_request, self.vllm_config.lora_config)
        except VLLMValidationError as error:
            _refusal.set(str(error))  # what the thread sets is lost
            raise
        return await original(self, lora_request)

    return add_lora


def _with_reason(response: Any) -> Any:
    """Turn vLLM's answer to a refusal into a 400 that gives the reason."""
    reason = _refusal.get()
    if reason is None or not isinstance(response, ErrorResponse):
        return response
    return create_error_response(message=reason, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)


def _load_lora_adapter(original: _Function) -> _Function:
    @functools.wraps(original)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        _refusal.set(None)
        response = _with_reason(await original(self, request, base_model_name))
        if request.load_inplace and not isinstance(response, ErrorResponse):
            # Prefixes computed with the weights before are cached under the same name and perhaps the same path.
            await self.engine_client.reset_prefix_cache()
            # vLLM would load it in place again with every request.
            self.lora_requests[request.lora_name].load_inplace = False
        return response

    return load_lora_adapter


def _resolve_lora(original: _Function) -> _Function:
    @functools.wraps(original)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        _refusal.set(None)
        return _with_reason(await original(self, lora_name))

    return resolve_lora


def _init_static_loras(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    async def init_static_loras(self: Any) -> None:
        await check_ready_async(self.engine_client, admission.gate)
        await original(self)

    return init_static_loras


def _load_adapter(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        dtype = self.lora_config.lora_dtype
        directory = admission.directory(_identity(lora_request), _local(lora_request), dtype, lora_request.load_inplace)
        token = _corrected.set(True)
        try:
            return original(self, msgspec.structs.replace(lora_request, lora_path=str(directory)))
        finally:
            _corrected.reset(token)

    return load_adapter


def _closed(original: _Function) -> _Function:
    @functools.wraps(original)
    def closed(cls: Any, *args: Any, **options: Any) -> Any:
        if not _corrected.get():
            raise RefusedError(f"csulora's guard does not know this way to {original.__qualname__}; nothing was loaded")
        return original(cls, *args, **options)

    return closed


def _cache_keys(fingerprint: str, original: _Function) -> _Function:
    @functools.wraps(original)
    def cache_keys(request: Any) -> Any:
        keys = original(request)
        return [*keys, ("csulora", fingerprint)] if keys else keys

    return cache_keys
