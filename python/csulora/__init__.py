"""Corrects trained LoRA adapters so that a model's safety alignment survives them.

pack = csulora.extract(base, aligned, rank=64)
adapter = csulora.load_adapter("my-adapter")
fixed, report = csulora.correct(adapter, pack, csulora.Policy.csulora(1.0))
csulora.save_adapter(fixed, "my-adapter-corrected")
"""

from csulora._version import __version__
from csulora.adapter import load_adapter, save_adapter
from csulora.audit import audit
from csulora.combination import combine
from csulora.correction import correct
from csulora.errors import BuildError, CsuloraError, HostError, InputError, InternalError, RefusedError
from csulora.extraction import extract
from csulora.formats import Adapter, LoraModule
from csulora.policy import Override, Policy
from csulora.report import Report
from csulora.subspace import Subspace
from csulora.verification import verify

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
