"""Numbers as texts of the page: shares in percent, undo as a fraction, as at the terminal."""

from __future__ import annotations


def percent(share: float, decimals: int = 1, sign: str = "") -> str:
    """Write a share in percent; ``sign`` is "+" where positive numbers carry one too."""
    value = 100 * share
    if abs(value) >= 10_000:
        return f"{value:{sign}.0e} %"
    text = f"{value:{sign}.{decimals}f}"
    return f"{text if float(text) else text.lstrip('+-')} %"


def number(value: float) -> str:
    """Write a number of any size with three significant digits."""
    return f"{value:#.3g}".removesuffix(".")


def undo(share: float) -> str:
    """Write an undo with three decimals."""
    return f"{share:+.3f}"


def short_undo(share: float) -> str:
    """Write an undo in at most six characters."""
    if abs(share) >= 1000:
        return f"{share:+.0e}"
    return f"{share:+.2f}" if abs(share) < 9.995 else f"{share:+.0f}"
