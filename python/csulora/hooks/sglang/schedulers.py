"""What runs in each of SGLang's schedulers: they load what a front end has published, and nothing else."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from csulora.errors import RefusedError, UncoveredRouteError
from csulora.hooks.signature import check_signature
from csulora.serving.publication import check_published

_Function = Callable[..., Any]

logger = logging.getLogger("sglang.csulora")

# Key under which a scheduler says, when it is ready, that it is guarded, and how.
PROBE = "csulora_fingerprint"

# Set while SGLang loads what was published.
_is_published: ContextVar[bool] = ContextVar("is_published", default=False)


class Guarded:
    """The function that a scheduler's process runs: it puts the guard in, then does what it did.

    SGLang starts such processes anew, so this is imported there, and nothing of the front end's is.
    """

    def __init__(self, run_scheduler_process: _Function, fingerprint: str) -> None:
        """Guard ``run_scheduler_process`` with the gate of this fingerprint."""
        self._run_scheduler_process = run_scheduler_process
        self._fingerprint = fingerprint

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run a scheduler."""
        install(self._fingerprint)
        return self._run_scheduler_process(*args, **options)


def check_worker() -> None:
    """Raise `HostError` unless what `install` replaces looks as expected."""
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.scheduler import Scheduler

    check_signature(Scheduler.get_init_info, "self")
    check_signature(LoRAManager._load_lora_adapter, "self", "lora_ref")
    check_signature(LoRAManager._load_lora_adapter_from_tensors, "self", "lora_ref", "tensors", "config_dict")
    check_signature(LoRAManager.create_lora_update_result, "self", "success", "error_message")
    check_signature(LoRAAdapter.initialize_weights, "self")
    check_signature(LoRAAdapter.initialize_weights_from_tensors, "self", "tensors")


def install(fingerprint: str) -> None:
    """Put the guard into a scheduler's process."""
    check_worker()
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.scheduler import Scheduler

    LoRAManager._load_lora_adapter = _load_lora_adapter(LoRAManager._load_lora_adapter)
    LoRAManager._load_lora_adapter_from_tensors = _refusing
    LoRAAdapter.initialize_weights = _closed(LoRAAdapter.initialize_weights)
    LoRAAdapter.initialize_weights_from_tensors = _closed(LoRAAdapter.initialize_weights_from_tensors)
    Scheduler.get_init_info = _get_init_info(fingerprint, Scheduler.get_init_info)


def _get_init_info(fingerprint: str, original: _Function) -> _Function:
    @functools.wraps(original)
    def get_init_info(self: Any) -> dict[str, Any]:
        return {**original(self), PROBE: fingerprint}

    return get_init_info


def _load_lora_adapter(original: _Function) -> _Function:
    @functools.wraps(original)
    def load_lora_adapter(self: Any, lora_ref: Any) -> Any:
        try:
            check_published(Path(lora_ref.lora_path))
        except RefusedError as error:
            return _refused(self, error)
        token = _is_published.set(True)
        try:
            return original(self, lora_ref)
        finally:
            _is_published.reset(token)

    return load_lora_adapter


def _refusing(self: Any, lora_ref: Any, *args: Any, **options: Any) -> Any:
    reason = f"{lora_ref.lora_name}: adapters are loaded from a directory or hub id, not from tensors"
    return _refused(self, RefusedError(reason))


def _refused(manager: Any, error: RefusedError) -> Any:
    """Return SGLang's answer to whoever asked; some of its routes drop that, so it is logged, too."""
    logger.error("csulora: %s", error)
    return manager.create_lora_update_result(success=False, error_message=f"csulora: {error}")


def _closed(original: _Function) -> _Function:
    @functools.wraps(original)
    def closed(self: Any, *args: Any, **options: Any) -> Any:
        if not _is_published.get():
            raise UncoveredRouteError(
                f"csulora: the guard does not know this way to {original.__qualname__}; nothing was loaded"
            )
        return original(self, *args, **options)

    return closed
