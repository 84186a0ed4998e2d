"""Where SGLang's front end is made to ask the guard.

An adapter named at start or by a request is admitted here, and its path replaced by that of the corrected copy. SGLang
keeps that path, so that what it evicts and loads again is the same copy.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups import lora_hook
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqOutput, LoadLoRAAdapterReqOutput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import get_lora
from sglang.srt.utils import kill_process_tree

from csulora.adapters.expert_encoding import PER_EXPERT
from csulora.errors import HostError, UncoveredRouteError
from csulora.hooks.sglang.placement import fitted
from csulora.hooks.sglang.schedulers import PROBE, Guarded, check_worker
from csulora.hooks.signature import check_signature
from csulora.io.hub import download
from csulora.policy.overrides import LARGEST
from csulora.serving.admission import Admission, Terms, refusal
from csulora.serving.publication import check_published
from csulora.serving.served_model import check_model

_Function = Callable[..., Any]

# Arguments under which adapters, or requests, would take ways that csulora does not cover: (name, value that is off).
_UNCOVERED = (
    ("encoder_only", False),
    ("grpc_mode", False),
    ("smg_grpc_mode", False),
    ("grpc_port", None),
    ("use_ray", False),
    ("uno_lora_path", None),
    ("nnodes", 1),
    ("dp_size", 1),
    ("attn_dp_size", 1),
    ("ep_join_mode", None),
    ("tokenizer_worker_num", 1),
)


def install(admission: Admission) -> None:
    """Put the guard into this process.

    Raises:
        HostError: a function that is replaced does not look as expected; nothing was replaced.
    """
    _check_signatures()
    check_worker()
    lora_hook.check_lora_server_args = _check_lora_server_args(admission, lora_hook.check_lora_server_args)
    TokenizerManager.load_lora_adapter = _load_lora_adapter(admission, TokenizerManager.load_lora_adapter)
    TokenizerManager.load_lora_adapter_from_tensors = _refusing_tensors
    launch = vars(Engine)["_launch_subprocesses"].__func__
    Engine._launch_subprocesses = classmethod(_launch_subprocesses(admission, launch))


def _check_signatures() -> None:
    check_signature(lora_hook.check_lora_server_args, "server_args")
    check_signature(TokenizerManager.load_lora_adapter, "self", "obj")
    check_signature(TokenizerManager.load_lora_adapter_from_tensors, "self", "obj")
    launch = vars(Engine)["_launch_subprocesses"].__func__
    check_signature(launch, "cls", "server_args", "init_tokenizer_manager_func", "run_scheduler_process_func")


def check_arguments(server_args: Any) -> None:
    """Raise `HostError` if a server with these arguments would take adapters by ways that are not covered."""
    if os.environ.get("SGLANG_RUST_SERVER", "0").lower() not in ("", "0", "false"):
        raise HostError("csulora does not cover SGLang's Rust server; unset SGLANG_RUST_SERVER")
    chosen = resolving_view(server_args)
    for name, off in _UNCOVERED:
        if (value := getattr(chosen, name)) not in (off, None):
            option = name.replace("_", "-")
            raise HostError(f"csulora does not cover SGLang with --{option} {value}; leave --{option} out")


def _admitted(admission: Admission, name: str, source: str, dtype: torch.dtype, max_rank: int | None) -> Path:
    """Return the directory to load in place of ``source``; one that was published before is that directory."""
    if admission.is_published(Path(source)):
        check_published(Path(source))
        return Path(source)
    terms = Terms(dtype, LARGEST if max_rank is None else max_rank, lambda: PER_EXPERT, fitted)
    return admission.admit((name, source), lambda: _located(source), terms, reload=True)


def _located(source: str) -> Path:
    """Return the local directory that SGLang would read, which may be one of the hub's."""
    if Path(source).exists():
        return Path(source)
    return download(source, ["*.json", "*.safetensors"])


def _check_lora_server_args(admission: Admission, original: _Function) -> _Function:
    """Admit what ``--lora-paths`` names, before any other process is started."""

    @functools.wraps(original)
    def check_lora_server_args(server_args: Any) -> None:
        original(server_args)
        chosen = resolving_view(server_args)
        dtype = model_config_of(server_args).dtype if chosen.lora_paths else torch.float32
        corrected = []
        for ref in (chosen.lora_paths or ()) if chosen.enable_lora else ():
            path = str(_admitted(admission, ref.lora_name, ref.lora_path, dtype, chosen.max_lora_rank))
            identity = LoRARef.deterministic_id(ref.lora_name, path)
            corrected.append(LoRARef(lora_id=identity, lora_name=ref.lora_name, lora_path=path, pinned=ref.pinned))
        if corrected:
            declare_resolution(server_args, "csulora", lora_paths=corrected)

    return check_lora_server_args


def _load_lora_adapter(admission: Admission, original: _Function) -> _Function:
    @functools.wraps(original)
    async def load_lora_adapter(self: Any, obj: Any, request: Any = None) -> Any:
        dtype, rank = self.model_config.dtype, get_lora().max_lora_rank
        try:
            directory = await asyncio.to_thread(_admitted, admission, obj.lora_name, obj.lora_path, dtype, rank)
        except Exception as error:  # also of a file system, or a bug of ours: the server lives on
            return LoadLoRAAdapterReqOutput(success=False, error_message=refusal(obj.lora_path, error))
        obj.lora_path = str(directory)
        return await original(self, obj, request)

    return load_lora_adapter


async def _refusing_tensors(self: Any, obj: Any, request: Any = None) -> Any:
    reason = UncoveredRouteError(f"{obj.lora_name}: adapters are loaded from a directory or hub id, not from tensors")
    return LoadLoRAAdapterFromTensorsReqOutput(success=False, error_message=refusal(obj.lora_name, reason))


def _launch_subprocesses(admission: Admission, original: _Function) -> _Function:
    """Guard the schedulers that are started, and let none serve that does not say so."""
    fingerprint = admission.gate.fingerprint

    @functools.wraps(original)
    def launch(
        cls: Any,
        server_args: Any,
        init_tokenizer_manager_func: _Function,
        run_scheduler_process_func: _Function,
        *args: Any,
        **options: Any,
    ) -> Any:
        server_args.resolve_once()
        check_arguments(server_args)
        chosen = resolving_view(server_args)
        check_model(chosen.model_path, admission.gate, chosen.revision)
        guarded = Guarded(run_scheduler_process_func, fingerprint)
        launched = original(cls, server_args, init_tokenizer_manager_func, guarded, *args, **options)
        started = [result for result in launched if hasattr(result, "scheduler_infos")]
        try:
            check_schedulers(started, fingerprint)
        except HostError:
            for pid in {pid for result in started for pid in result.all_child_pids}:
                kill_process_tree(pid)
            raise
        return launched

    return launch


def check_schedulers(launched: list[Any], fingerprint: str) -> None:
    """Raise `HostError` unless every scheduler that was started says that it is guarded by this gate."""
    answers = [info.get(PROBE) for result in launched for info in result.scheduler_infos]
    if not answers or any(answer != fingerprint for answer in answers):
        raise HostError(f"schedulers of SGLang are guarded by {answers}, and this process by {fingerprint}")
