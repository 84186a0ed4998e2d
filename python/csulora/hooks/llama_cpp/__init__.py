"""llama.cpp in Python: adapters are corrected before they are loaded."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csulora.hooks.llama_cpp.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for: it needs llama-cpp-python, and the cache beside it does not."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from csulora.hooks.llama_cpp.loading import load

    return load
