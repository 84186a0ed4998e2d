"""Whether a function of a host is the one that a hook was written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from csulora.errors import HostError


def check_signature(function: Callable[..., Any], *parameters: str) -> None:
    """Raise `HostError` unless ``function`` begins with these parameters, in this order."""
    found = tuple(inspect.signature(function).parameters)
    if found[: len(parameters)] != parameters:
        host = function.__module__.partition(".")[0]
        raise HostError(
            f"{function.__module__}.{function.__qualname__} takes ({', '.join(found)}), and csulora knows it as "
            f"({', '.join(parameters)}, ...); use a csulora that knows this version of {host}"
        )
