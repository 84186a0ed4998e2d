"""What csulora raises: every message says what is wrong, where (file, tensor) and what to do about it."""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeVar


class Obtainable(Protocol):
    """A type whose objects csulora makes: ``obtained_by`` says how."""

    obtained_by: ClassVar[str]


T = TypeVar("T", bound=Obtainable)

_LONGEST_MESSAGE = 2000  # characters; two paths of the longest kind do not fit, and no message needs them


def printable(text: object, longest: int = _LONGEST_MESSAGE) -> str:
    r"""Return text that may come from a file as it can stand in one line of a log or terminal.

    Whatever is not printable (line breaks, escape sequences, text direction marks, lone surrogates) becomes an escape
    as in Python source. Of text beyond ``longest`` characters the middle is left out.

    >>> printable("q_proj\x1b[2J\nrefused")
    'q_proj\\x1b[2J\\nrefused'
    """
    whole = str(text)
    if len(whole) > longest:
        half = longest // 2
        whole = f"{whole[:half]} [...{len(whole) - 2 * half} characters...] {whole[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


class CsuloraError(Exception):
    """Base class of everything csulora raises on purpose; its message is one printable line of bounded length."""

    def __init__(self, *parts: object) -> None:
        """Keep what is said, escaped: names and values in a message may come from an upload."""
        super().__init__(*map(printable, parts))


class InputError(CsuloraError, ValueError):
    """An input is malformed, missing, or does not fit the others (exit code 4)."""


def check_type(value: object, wanted: type[T], name: str) -> T:
    """Return an argument that is what it should be, or raise `InputError` with how to get that."""
    if isinstance(value, wanted):
        return value
    kind = "missing" if value is None else f"a {type(value).__name__}"
    raise InputError(f"{name} is {kind}; it must be a csulora.{wanted.__name__}: {wanted.obtained_by}")


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
