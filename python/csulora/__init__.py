"""Corrects trained LoRA adapters so that a model's safety alignment survives them.

subspace = csulora.extract(base, aligned, rank=64)
adapter = csulora.load_adapter("my-adapter")
fixed, report = csulora.correct(adapter, subspace, csulora.Policy.csulora(1.0))
csulora.save_adapter(fixed, "my-adapter-corrected")

Names are imported when they are first asked for, so that what needs no torch does not load it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from csulora.errors import BuildError, CsuloraError, HostError, InputError, InternalError, RefusedError

if TYPE_CHECKING:
    from csulora.adapters.disk import load_adapter, save_adapter
    from csulora.adapters.lora import Adapter, LoraModule
    from csulora.correction import controls
    from csulora.correction.audit import audit
    from csulora.correction.combination import combine
    from csulora.correction.correct import correct
    from csulora.correction.report import Report
    from csulora.evaluation.evaluate import evaluate
    from csulora.extraction.extract import extract
    from csulora.extraction.verification import verify
    from csulora.policy.overrides import Override
    from csulora.policy.policy import Policy
    from csulora.subspace.subspace import Subspace
    from csulora.unalignment.canary import canary

__version__: str = version("csulora")

_MODULES = {
    "Adapter": "adapters.lora",
    "LoraModule": "adapters.lora",
    "Override": "policy.overrides",
    "Policy": "policy.policy",
    "Report": "correction.report",
    "Subspace": "subspace.subspace",
    "audit": "correction.audit",
    "canary": "unalignment.canary",
    "combine": "correction.combination",
    "controls": "correction.controls",
    "correct": "correction.correct",
    "evaluate": "evaluation.evaluate",
    "extract": "extraction.extract",
    "load_adapter": "adapters.disk",
    "save_adapter": "adapters.disk",
    "verify": "extraction.verification",
}

_PACKAGES = {"controls"}  # public as they are, not for what is in them

__all__ = [
    "Adapter",
    "BuildError",
    "CsuloraError",
    "HostError",
    "InputError",
    "InternalError",
    "LoraModule",
    "Override",
    "Policy",
    "RefusedError",
    "Report",
    "Subspace",
    "__version__",
    "audit",
    "canary",
    "combine",
    "controls",
    "correct",
    "evaluate",
    "extract",
    "load_adapter",
    "save_adapter",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'csulora' has no attribute {name!r}")
    module = import_module(f"csulora.{_MODULES[name]}")
    found = module if name in _PACKAGES else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
