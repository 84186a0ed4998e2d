"""What csulora raises: every message says what is wrong, where (file, tensor) and what to do about it.

Each type has a reason code, by which decision logs and metrics sort what was not let through. A code never changes its
meaning; a new reason gets a new type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar


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
    if whole.isprintable():
        return whole
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


class CsuloraError(Exception):
    """Base class of everything csulora raises on purpose; its message is one printable line of bounded length."""

    reason_code: ClassVar[str] = "error"

    def __init__(self, *parts: object) -> None:
        """Keep what is said, escaped: names and values in a message may come from an upload."""
        super().__init__(*map(printable, parts))


class InputError(CsuloraError, ValueError):
    """An input is malformed, missing, or does not fit the others (exit code 4)."""

    reason_code = "malformed"


class MissingFileError(InputError):
    """A file that an adapter needs is not there."""

    reason_code = "missing-file"


class NotFiniteError(InputError):
    """A factor holds NaN, infinity, or a number that its storage type cannot hold."""

    reason_code = "not-finite"


class OtherModelError(InputError):
    """The adapter is for a model of another size than the subspace file."""

    reason_code = "other-model"


class LogError(InputError):
    """A decision cannot be written down: a fault of this machine's, whatever the adapter is."""

    reason_code = "log"


def check_type(value: object, wanted: type[T], name: str) -> T:
    """Return an argument that is what it should be, or raise `InputError` with how to get that."""
    if isinstance(value, wanted):
        return value
    kind = "missing" if value is None else f"a {type(value).__name__}"
    raise InputError(f"{name} is {kind}; it must be a csulora.{wanted.__name__}: {wanted.obtained_by}")


class RefusedError(CsuloraError):
    """An input is well-formed, but csulora's rules or the policy do not let it through (exit code 3)."""

    reason_code = "rule"


class NotPlainLoraError(RefusedError):
    """The adapter is more or other than plain LoRA, such as DoRA, or may be."""

    reason_code = "not-plain-lora"


class UncoveredError(RefusedError):
    """The subspace file lacks a module, and the policy does not name it."""

    reason_code = "uncovered"


class OtherFamilyError(RefusedError):
    """The adapter is for a model of another family or layout than the subspace file."""

    reason_code = "other-family"


class LimitError(RefusedError):
    """The adapter was measured, and is beyond a limit of the policy.

    Attributes:
        totals: those of its report, as in a decision.
    """

    totals: Mapping[str, Any] | None = None


class UndoLimitError(LimitError):
    """The adapter undoes more of the alignment than the policy allows."""

    reason_code = "undo-limit"


class UndoTogetherError(RefusedError):
    """Adapters that a host adds up undo more together than the policy allows."""

    reason_code = "undo-together"


class SignatureError(RefusedError):
    """A signature is required, and there is none that holds."""


class UnsignedError(SignatureError):
    """There is no signature."""

    reason_code = "unsigned"


class OtherSignerError(SignatureError):
    """The signature is by somebody who is not trusted, or was altered."""

    reason_code = "other-signer"


class ChangedError(SignatureError):
    """A signed file has another content, or is gone."""

    reason_code = "changed-since-signed"


class NotCoveredError(SignatureError):
    """There is a file of which the signature says nothing."""

    reason_code = "not-covered-by-signature"


class AnnihilationLimitError(LimitError):
    """The adapter removes a direction that the aligned matrix writes, or nobody can tell whether it does."""

    reason_code = "annihilation-limit"


class TooLargeError(RefusedError):
    """The adapter has a rank, a number of tensors or a pattern above the limit."""

    reason_code = "too-large"


class BaseCopyError(RefusedError):
    """The adapter holds a base matrix that is not known to be the aligned checkpoint's."""

    reason_code = "base-weights"


class AmbiguousError(RefusedError):
    """Servers disagree on what the adapter's files mean, or a name fits two modules."""

    reason_code = "ambiguous"


class UnsafeFileError(RefusedError):
    """A file can run code, is a link, is one of too many, or can be changed by others."""

    reason_code = "unsafe-file"


class UnsafeNameError(RefusedError):
    """A name is too long, not printable, or like that of another kind of file."""

    reason_code = "unsafe-name"


class HostLimitError(RefusedError):
    """The host cannot apply the adapter as it is, or applies it wrongly."""

    reason_code = "host-limit"


class UncoveredRouteError(RefusedError):
    """The host was asked to load by a way that no correction covers."""

    reason_code = "uncovered-route"


class OtherSubspaceError(RefusedError):
    """The subspace file is another one than was asked for, or tuned for."""

    reason_code = "other-subspace"


class NotAdjustedError(RefusedError):
    """The policy has strengths for some adapters, and none for this one."""

    reason_code = "not-adjusted"


class ExhaustingError(RefusedError):
    """Guards were killed while they read the adapter."""

    reason_code = "exhausting"


class BuildError(CsuloraError, ImportError):
    """The compiled core does not fit the installed torch."""

    reason_code = "build"


class HostError(CsuloraError, ImportError):
    """The host (vLLM, PEFT, ...) is not one that the hook knows, or the hook is not active where it must be."""

    reason_code = "host"


class InternalError(CsuloraError, RuntimeError):
    """csulora broke a promise to itself; please report it."""

    reason_code = "internal"


class DeviceError(InternalError):
    """The GPU, its driver or one of its libraries failed."""

    reason_code = "device"


class DeviceMemoryError(DeviceError, MemoryError):
    """The GPU's memory ran out."""

    reason_code = "device-memory"


MACHINE, BUG = "machine", "bug"  # codes of what csulora does not raise: a file system's errors, and all others
GONE = "upload-gone"  # code of a withdrawal: somebody took the adapter out of INCOMING


def reason_code_of(error: BaseException) -> str:
    """Return the reason code of whatever was raised.

    >>> reason_code_of(UndoLimitError("module q_proj undoes 0.9 of its alignment")), reason_code_of(OSError("full"))
    ('undo-limit', 'machine')
    """
    if isinstance(error, CsuloraError):
        return error.reason_code
    return MACHINE if isinstance(error, OSError) else BUG


def reason_codes() -> list[str]:
    """Return every code that there is, sorted."""
    found, left = {MACHINE, BUG, GONE}, [CsuloraError]
    while left:
        kind = left.pop()
        found.add(kind.reason_code)
        left += kind.__subclasses__()
    return sorted(found)
