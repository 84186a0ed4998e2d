"""Whether every process of an engine is guarded by the same subspace file and policy before it serves anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from csulora.errors import HostError
from csulora.hooks.vllm import logger
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
        gate.source.sha256,
    )
