"""What csulora raises: every message says what is wrong, where (file, tensor) and what to do about it."""

from __future__ import annotations


class CsuloraError(Exception):
    """Base class of everything csulora raises on purpose."""


class InputError(CsuloraError, ValueError):
    """An input is malformed, missing, or does not fit the others (exit code 4)."""


class RefusedError(CsuloraError):
    """An input is well-formed, but csulora's rules or the policy do not let it through (exit code 3)."""


class BuildError(CsuloraError, ImportError):
    """The compiled core does not fit the installed torch."""


class HostError(CsuloraError, ImportError):
    """The host (vLLM, PEFT, ...) is not one that the hook knows, or the hook is not active where it must be."""


class InternalError(CsuloraError, RuntimeError):
    """csulora broke a promise to itself; please report it."""


class DeviceError(InternalError):
    """The GPU, its driver or one of its libraries failed."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The GPU's memory ran out."""
