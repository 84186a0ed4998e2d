"""Adapters corrected before SGLang's schedulers hear of them; these load nothing else, whatever route it came by.

Configured by the environment variables of `csulora.serving.variables`. Start servers with ``csulora sglang-serve``, or
call `activate` before making an ``sglang.Engine``: both fail unless every scheduler is guarded. SGLang's own plugins
take no part in it, since SGLang only logs their failures.

`front_end` decides and publishes, `placement` says what SGLang can hold, `schedulers` closes every other way of
loading, `launcher` starts a server.
"""

from __future__ import annotations

import logging

from csulora.errors import HostError
from csulora.hooks.hosts import SGLANG
from csulora.serving.gate import Gate

# SGLang configures the logger called sglang, and those below it.
logger = logging.getLogger("sglang.csulora")

_active: str | None = None


def activate() -> str:
    """Guard every engine and server that this process starts, once; return the gate's fingerprint.

    Raises:
        HostError: SGLang is not of a version that this hook knows.
        CsuloraError: the subspace file or the policy cannot be used.
    """
    global _active
    if _active is None:
        try:
            import sglang
        except ImportError as error:
            raise HostError(f"SGLang cannot be imported ({error}); install csulora beside SGLang") from error
        SGLANG.check(sglang.__version__)
        gate = Gate.from_environment(route="sglang")
        from csulora.hooks.sglang.front_end import install
        from csulora.serving.admission import Admission

        install(Admission(gate))
        logger.info("csulora guards this process: policy %s, fingerprint %s", gate.policy, gate.fingerprint)
        _active = gate.fingerprint
    return _active
