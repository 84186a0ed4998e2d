"""Corrects trained LoRA adapters so that a model's safety alignment survives them.

subspace file = csulora.extract(base, aligned, rank=64)
adapter = csulora.load_adapter("my-adapter")
fixed, report = csulora.correct(adapter, subspace file, csulora.Policy.csulora(1.0))
csulora.save_adapter(fixed, "my-adapter-corrected")
"""

from importlib.metadata import version

__version__: str = version("csulora")

from csulora.adapters.disk import load_adapter, save_adapter
from csulora.adapters.lora import Adapter, LoraModule
from csulora.correction.audit import audit
from csulora.correction.combination import combine
from csulora.correction.correct import correct
from csulora.correction.report import Report
from csulora.errors import BuildError, CsuloraError, HostError, InputError, InternalError, RefusedError
from csulora.extraction.extract import extract
from csulora.extraction.verification import verify
from csulora.policy.policy import Override, Policy
from csulora.subspace.subspace import Subspace

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
    "combine",
    "correct",
    "extract",
    "load_adapter",
    "save_adapter",
    "verify",
]
