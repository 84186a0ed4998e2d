"""Where vLLM is made to ask the guard.

Front end: a refused adapter is answered with its reason, before the engine hears of it; of others the engine gets the
corrected one's path. Worker: any other way of making LoRA weights is closed. Scheduler: cached prefixes of guarded
adapters have keys of their own. All processes: they can be asked whether they are guarded.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
from vllm.config import VllmConfig
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

from csulora.adapters.expert_encoding import FUSED
from csulora.errors import InputError, RefusedError, UncoveredRouteError, UnsafeNameError
from csulora.hooks.signature import check_signature
from csulora.hooks.vllm.experts import layout_of, without_ignored
from csulora.hooks.vllm.readiness import PROBE, check_ready, check_ready_async
from csulora.serving.admission import Admission, Terms, refusal
from csulora.serving.publication import check_published
from csulora.serving.served_model import check_model

# Set in a worker while vLLM loads what was corrected.
_is_corrected: ContextVar[bool] = ContextVar("is_corrected", default=False)

# Why adapters were refused that the request which the current task answers wanted to add; vLLM drops the reason on one
# of its routes.
_refusals: ContextVar[list[str] | None] = ContextVar("refusals", default=None)

# The id that the adapter gets which the current task loads in place of another.
_next_id: ContextVar[int | None] = ContextVar("next_id", default=None)

_Function = Callable[..., Any]

_LONGEST_FILE_NAME = 255  # bytes; Linux's limits
_LONGEST_PATH = 4095


def install(admission: Admission) -> None:
    """Put the guard into this process.

    Raises:
        HostError: a function that is replaced does not look as expected; nothing was replaced.
    """
    _check_signatures()
    fingerprint = admission.gate.fingerprint

    InputProcessor.process_inputs = _process_inputs(admission, InputProcessor.process_inputs)
    LLMEngine.__init__ = _engine_init(admission, LLMEngine.__init__)
    AsyncLLM.__init__ = _checking_model(admission, AsyncLLM.__init__)
    LLMEngine.add_lora = _add_lora(admission, LLMEngine.add_lora)
    AsyncLLM.add_lora = _add_lora_async(admission, AsyncLLM.add_lora)
    OpenAIServingModels.load_lora_adapter = _load_lora_adapter(OpenAIServingModels.load_lora_adapter)
    OpenAIServingModels.resolve_lora = _resolve_lora(OpenAIServingModels.resolve_lora)
    OpenAIServingModels.init_static_loras = _init_static_loras(admission, OpenAIServingModels.init_static_loras)

    WorkerLoRAManager._load_adapter = _load_adapter(WorkerLoRAManager._load_adapter)
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
        if not _is_file_name(lora_name) or not path.is_dir():
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))  # vLLM sets the id


def _is_file_name(name: str) -> bool:
    """Whether a name is one component of a path as it stands: `a/` and `./a` would be further adapters for vLLM."""
    is_shown = name.isprintable() and len(name.encode()) <= _LONGEST_FILE_NAME
    return is_shown and Path(name).name == name and name != ".."


def _check_request(request: LoRARequest) -> None:
    """Raise `RefusedError` unless name and path can be handed to the engine's processes and to the file system."""
    for what, text in (("name", request.lora_name), ("path", request.lora_path)):
        if not text.isprintable() or len(text.encode()) > _LONGEST_PATH:
            raise UnsafeNameError(
                f"{text}: the adapter's {what} has more than {_LONGEST_PATH} bytes or is not printable; rename it"
            )


def _check_signatures() -> None:
    check_signature(InputProcessor.process_inputs, "self", "request_id", "prompt", "params")
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


def _corrected(admission: Admission, request: LoRARequest, config: VllmConfig) -> LoRARequest:
    """Return a request for the corrected adapter; what a client says of its layout is not believed."""
    lora, layout = config.lora_config, functools.partial(layout_of, config)
    identity = (request.lora_name, request.lora_int_id, request.lora_path)

    def locate() -> Path:
        return Path(get_adapter_absolute_path(request.lora_path))

    try:
        _check_request(request)
        terms = Terms(
            lora.lora_dtype,
            lora.max_lora_rank,
            layout,
            lambda corrected: without_ignored(corrected, config, admission.gate.policy),
        )
        directory = admission.admit(identity, locate, terms, request.load_inplace)
        is_fused = lora.enable_mixed_moe_lora_format and layout() == FUSED
    except Exception as error:  # also of a file system, or a bug of ours: the engine must not hear of it
        raise VLLMValidationError(refusal(request.lora_path, error)) from error
    return msgspec.structs.replace(request, lora_path=str(directory), is_3d_lora_weight=is_fused)


def _process_inputs(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **options: Any) -> Any:
        request = original(self, *args, **options)
        if request.lora_request is not None:
            request.lora_request = _corrected(admission, request.lora_request, self.vllm_config)
        return request

    return process_inputs


def _engine_init(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        check_ready(self, admission.gate)

    return _checking_model(admission, init)


def _checking_model(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **options: Any) -> None:
        model = vllm_config.model_config
        check_model(model.model, admission.gate, model.revision)
        original(self, vllm_config, *args, **options)

    return init


def _add_lora(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    def add_lora(self: Any, lora_request: LoRARequest) -> Any:
        return original(self, _corrected(admission, lora_request, self.vllm_config))

    return add_lora


def _add_lora_async(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    async def add_lora(self: Any, lora_request: LoRARequest) -> Any:
        new_id = _next_id.get()
        if new_id is not None:  # vLLM's server keeps this object as the one that further requests name
            lora_request.lora_int_id, lora_request.load_inplace = new_id, False
        try:
            corrected = await asyncio.to_thread(_corrected, admission, lora_request, self.vllm_config)
        except VLLMValidationError as error:
            if (refusals := _refusals.get()) is not None:
                refusals.append(str(error))
            raise
        return await original(self, corrected)

    return add_lora


async def _with_reason(answer: Awaitable[Any]) -> Any:
    """Await vLLM's answer, and turn one to a refusal into a 400 that gives the reason."""
    refusals: list[str] = []
    token = _refusals.set(refusals)
    try:
        response = await answer
    finally:
        _refusals.reset(token)
    if not refusals or not isinstance(response, ErrorResponse):
        return response
    return create_error_response(message=refusals[-1], err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)


def _load_lora_adapter(original: _Function) -> _Function:
    """Replace an adapter by a new one of the same name, not in place.

    vLLM would exchange the weights under requests that are running, and keep what it computed with those before.
    """

    @functools.wraps(original)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        token = _next_id.set(self.lora_id_counter.inc(1) if request.load_inplace else None)
        try:
            return await _with_reason(original(self, request, base_model_name))
        finally:
            _next_id.reset(token)

    return load_lora_adapter


def _resolve_lora(original: _Function) -> _Function:
    @functools.wraps(original)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        return await _with_reason(original(self, lora_name))

    return resolve_lora


def _init_static_loras(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    async def init_static_loras(self: Any) -> None:
        await check_ready_async(self.engine_client, admission.gate)
        await original(self)

    return init_static_loras


def _load_adapter(original: _Function) -> _Function:
    @functools.wraps(original)
    def load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        try:
            check_published(Path(lora_request.lora_path))
        except RefusedError as error:
            raise RefusedError(refusal(lora_request.lora_path, error)) from error
        token = _is_corrected.set(True)
        try:
            return original(self, lora_request)
        finally:
            _is_corrected.reset(token)

    return load_adapter


def _closed(original: _Function) -> _Function:
    @functools.wraps(original)
    def closed(cls: Any, *args: Any, **options: Any) -> Any:
        if not _is_corrected.get():
            raise UncoveredRouteError(
                f"csulora: its guard does not know this way to {original.__qualname__}; nothing was loaded"
            )
        return original(cls, *args, **options)

    return closed


def _cache_keys(fingerprint: str, original: _Function) -> _Function:
    @functools.wraps(original)
    def cache_keys(request: Any) -> Any:
        keys = original(request)
        return [*keys, ("csulora", fingerprint)] if keys else keys

    return cache_keys
