"""Adapters corrected before vLLM's engine hears of them; its workers load nothing else, whatever route it came by.

Installed as a plugin of vLLM (entry point ``csulora`` in ``vllm.general_plugins``) and configured by environment
variables:

    CSULORA_SUBSPACE    subspace file of the served model; required
    CSULORA_POLICY      policy: a preset's name or a TOML file; there is no default
    CSULORA_DECISIONS   file to append a JSON line per decision to
    CSULORA_ADAPTERS    directory whose subdirectories may be asked for by name (a LoRAResolver)
    CSULORA_ANY_MODEL   1: do not require that the served weights are those of the subspace file's aligned checkpoint
    CSULORA_REQUIRE_SIGNATURE        who must have signed adapters; see `csulora.serving.trust.Trust.open`
    CSULORA_REQUIRE_RULES_SIGNATURE  who must have signed subspace file and policy file
    TMPDIR              where the corrected adapters are kept while the server runs; all its processes must share it

Start servers with ``csulora vllm-serve``: it fails unless the guard is active in every process. `patches` puts
`csulora.serving.admission` into vLLM, `launcher` starts a server.
"""

from __future__ import annotations

import logging
import os

import torch

from csulora.errors import HostError
from csulora.hooks.hosts import VLLM
from csulora.serving.gate import Gate

ENTRY_POINT = "csulora"
ADAPTERS_VARIABLE = "CSULORA_ADAPTERS"

# vLLM configures the logger called vllm, and those below it.
logger = logging.getLogger("vllm.csulora")

_active: str | None = None


def activate() -> str:
    """Put the guard into this process, once; return the gate's fingerprint.

    Raises:
        HostError: vLLM is not of a version this hook knows.
        CsuloraError: the subspace file or the policy cannot be used.
    """
    global _active
    if _active is None:
        _check_host()
        _active = _install()
    return _active


def _check_host() -> None:
    try:
        import vllm
    except ImportError as error:
        raise HostError(f"vLLM cannot be imported ({error}); install csulora beside vLLM") from error
    VLLM.check(vllm.__version__)
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        raise HostError("csulora cannot refuse adapters in vLLM's Rust front end; unset VLLM_USE_RUST_FRONTEND")


def _install() -> str:
    from csulora.hooks.vllm.patches import install, register_resolver
    from csulora.serving.admission import Admission

    threads = torch.get_num_threads()
    # vLLM may fork this process, and a thread pool of OpenMP does not survive that.
    torch.set_num_threads(1)
    try:
        gate = Gate.from_environment(route="vllm")
    finally:
        torch.set_num_threads(threads)
    install(Admission(gate))
    register_resolver(os.environ.get(ADAPTERS_VARIABLE))
    logger.info(
        "csulora guards this process: subspace file %s, policy %s (%s), fingerprint %s",
        gate.subspace.sha256,
        gate.source.sha256,
        gate.policy,
        gate.fingerprint,
    )
    return gate.fingerprint
