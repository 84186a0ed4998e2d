"""Whether every process of an engine is guarded by the same subspace file and policy before it serves anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from csulora.errors import HostError, InputError
from csulora.hooks.vllm import ANY_MODEL_VARIABLE, logger
from csulora.models.checkpoint import Checkpoint
from csulora.serving.gate import Gate

# Method by which a process says that it is guarded, and how.
PROBE = "csulora_fingerprint"


def check_ready(engine: Any, gate: Gate) -> None:
    """Raise `HostError` unless all processes of an ``LLMEngine`` have this gate."""
    try:
        answers = engine.collective_rpc(PROBE)
    except Exception as error:
        raise HostError(f"a process of vLLM does not say that csulora guards it: {error}") from error
    _check_answers(answers, gate)


async def check_ready_async(engine: Any, gate: Gate) -> None:
    """Raise `HostError` unless all processes of an ``AsyncLLM`` have this gate."""
    try:
        workers = await engine.collective_rpc(PROBE)
        cores = [await engine.engine_core.call_utility_async(PROBE)]
    except Exception as error:
        raise HostError(f"a process of vLLM does not say that csulora guards it: {error}") from error
    _check_answers([*workers, *cores], gate)


def _check_answers(answers: Sequence[Any], gate: Gate) -> None:
    if not answers or any(answer != gate.fingerprint for answer in answers):
        raise HostError(f"processes of vLLM are guarded differently: {answers}, and this one by {gate.fingerprint}")
    logger.info(
        "csulora is ready: all %d processes behind this one are guarded by subspace file %s, policy %s",
        len(answers),
        gate.subspace.sha256,
        gate.policy_sha256,
    )


def check_model(model: str, gate: Gate) -> None:
    """Raise unless the served weights are those of the subspace file's aligned checkpoint; one matrix is compared.

    Raises:
        InputError: they are not, or cannot be read.
    """
    if os.environ.get(ANY_MODEL_VARIABLE) == "1":
        return
    hint = (
        f"serve the subspace file's aligned checkpoint, or set {ANY_MODEL_VARIABLE}=1 if this is a converted copy of it"
    )
    checkpoint = Checkpoint.open(model)
    module = min(gate.subspace, key=lambda name: gate.subspace[name].u.numel() + gate.subspace[name].v.numel())
    if module not in checkpoint.weights:
        raise InputError(f"{model}: has no {module}, which the subspace file covers; {hint}")
    if checkpoint.load(module)[1] != gate.subspace[module].aligned_sha256:
        raise InputError(f"{model}: {module} is not what the subspace file was made of; {hint}")
