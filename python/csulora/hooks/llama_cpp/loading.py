"""llama.cpp in Python (llama-cpp-python): adapters are corrected before llama.cpp loads them.

    from csulora.hooks.llama_cpp import load

    llama = load("model.gguf", "my-adapter", "subspace.safetensors", Policy.csulora(), n_ctx=4096)

The corrected adapter is kept in a cache and corrected once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import llama_cpp

from csulora.adapters.gguf import file as gguf
from csulora.errors import InputError, UncoveredRouteError
from csulora.hooks.llama_cpp.cache import CorrectedCache, default_directory
from csulora.models.gguf_base import BaseModel
from csulora.policy.policy import Policy
from csulora.serving.gate import Gate
from csulora.subspace.subspace import Subspace

# With these llama-cpp-python would load a file that nobody corrected.
_BYPASSES = ("lora_path", "lora_base", "lora_scale")


def load(
    model_path: str | Path,
    adapter: str | Path | Mapping[str | Path, float],
    subspace: str | Path | Subspace,
    policy: Policy | str | Path | None = None,
    *,
    cache: str | Path | None = None,
    decisions: str | Path | None = None,
    require_signature: str | Path | None = None,
    **kwargs: Any,
) -> llama_cpp.Llama:
    """Load a model with corrected adapters.

    Args:
        model_path: the GGUF model.
        adapter: a PEFT directory or a GGUF LoRA file, or several with the factor by which each one's corrected
            update is multiplied.
        subspace: the subspace file of the model.
        policy: what to keep and what to refuse: a preset's name, a TOML file or a `Policy`; there is no default. Its
            ``max_undo`` also limits the sum of the corrected updates, each times its factor.
        cache: where corrected files are kept; `default_directory` if absent.
        decisions: file to append a JSON line per decision to.
        require_signature: who must have signed adapters, see `csulora.serving.trust.Trust.open`; None: nobody.
        kwargs: passed to ``llama_cpp.Llama``.

    Returns:
        The model. It cannot be pickled or copied, as llama-cpp-python would leave the adapters behind.

    Raises:
        RefusedError: an adapter, or their sum, is refused by the policy, or cannot be corrected or run by llama.cpp.
        InputError: a file is malformed, does not fit the others, or llama.cpp does not load it.

    >>> from csulora.hooks import llama_cpp
    >>> model = llama_cpp.load(gguf, adapter, subspace, csulora.Policy.protect(1.0), cache="cache", verbose=False)
    >>> model.n_ctx()
    512
    """
    if bypass := [name for name in _BYPASSES if name in kwargs]:
        raise UncoveredRouteError(f"{bypass[0]} would load an adapter that was not corrected; pass it as `adapter`")
    adapters = adapter if isinstance(adapter, Mapping) else {adapter: 1.0}
    if not adapters:
        raise InputError(f"{model_path}: no adapter is given; load the model with llama_cpp.Llama itself")
    for path, scale in adapters.items():
        if not math.isfinite(scale):
            raise InputError(f"{path}: its scale is {scale}; it must be finite")
    gate = Gate.open(subspace, policy, decisions, route="llama.cpp", require_signature=require_signature)
    corrected_cache = CorrectedCache(Path(cache) if cache else default_directory())
    base = BaseModel.open(model_path)
    files = [corrected_cache.corrected(Path(path), base, gate) for path in adapters]
    if list(adapters.values()) != [1.0]:
        served = {str(path): gguf.read(file, base) for path, file in zip(adapters, files, strict=True)}
        gate.check_sum(served, list(adapters.values()))
    llama = llama_cpp.Llama(str(model_path), **kwargs)
    try:
        _attach(llama, files, list(adapters.values()))
    except BaseException:
        llama.close()
        raise
    vars(llama)["__getstate__"] = _no_state  # what copying and pickling ask the object for
    return llama


def _no_state() -> NoReturn:
    raise UncoveredRouteError(
        "a llama.cpp model is copied without its adapters; where a copy is needed (copy, pickle, another process), "
        "call csulora.hooks.llama_cpp.load there"
    )


def _attach(llama: llama_cpp.Llama, files: list[Path], scales: list[float]) -> None:
    """Give the context these adapters and no other."""
    handles = []
    for file in files:
        handle = llama_cpp.llama_adapter_lora_init(llama.model, str(file).encode())
        if not handle:
            raise InputError(f"{file}: llama.cpp does not load it; its reason is on stderr (verbose=True)")
        handles.append(handle)
    count = len(handles)
    array = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*handles)
    if llama_cpp.llama_set_adapters_lora(llama.ctx, array, count, (ctypes.c_float * count)(*scales)):
        raise InputError("llama.cpp does not apply the adapters; its reason is on stderr (verbose=True)")
