"""The picture of the layouts of experts: which rows and columns of the factors belong to which expert.

    python docs/experts.py

Writes docs/pages/experts.svg. There are three experts of rank 2, each with a colour of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

PICTURE = Path(__file__).parent / "pages" / "experts.svg"

_INK, _COLOURS = "#1f2328", ("#0072b2", "#d55e00", "#009e73")
_EXPERTS, _RANK = 3, 2
_STRIP, _LENGTH, _GAP = 14, 62, 8  # pixels: of a row or column of a factor, and between two factors
_BY_EXPERT = [expert for expert in range(_EXPERTS) for _ in range(_RANK)]
_BY_RANK = [expert for _ in range(_RANK) for expert in range(_EXPERTS)]
_TOP = 64


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{_INK}" font-weight="{weight}">{text}</text>'


def _strip(x: float, y: float, width: float, height: float, expert: int) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{_COLOURS[expert]}" stroke="#fff"/>'
        f'<text x="{x + width / 2:g}" y="{y + height / 2 + 4:g}" fill="#fff" font-size="10" '
        f'text-anchor="middle">{expert}</text>'
    )


def _columns(x: float, y: float, experts: Sequence[int]) -> Iterator[str]:
    """B: a column for each entry."""
    for at, expert in enumerate(experts):
        yield _strip(x + _STRIP * at, y, _STRIP, _LENGTH, expert)


def _rows(x: float, y: float, experts: Sequence[int]) -> Iterator[str]:
    """A: a row for each entry."""
    for at, expert in enumerate(experts):
        yield _strip(x, y + _STRIP * at, _LENGTH, _STRIP, expert)


def _fused(x: float, title: str, note: str, order: Sequence[int]) -> list[str]:
    after_b = x + _STRIP * len(order) + _GAP
    return [
        _text(x, 24, title, "bold"),
        _text(x, 42, note),
        *_columns(x, _TOP, order),
        *_rows(after_b, _TOP, _BY_EXPERT),
        _text(x, _TOP + 104, "B (out, r E)"),
        _text(after_b, _TOP + 104, "A (E r, in)"),
    ]


def _apart(x: float, title: str, note: str) -> list[str]:
    marks = [_text(x, 24, title, "bold"), _text(x, 42, note)]
    for expert in range(_EXPERTS):
        left = x + 106 * expert
        marks += _columns(left, _TOP, [expert] * _RANK)
        marks += _rows(left + _STRIP * _RANK + _GAP / 2, _TOP, [expert] * _RANK)
    return [*marks, _text(x, _TOP + 104, "B (out, r), A (r, in) of each expert")]


def svg() -> str:
    """Return the picture."""
    marks = [
        *_fused(20, "fused: PEFT", "columns of B rank by rank", _BY_RANK),
        *_fused(220, "fused: Unsloth until 9/2026", "columns of B expert by expert", _BY_EXPERT),
        *_apart(440, "per expert, and 3-D in GGUF", "a pair of factors each"),
    ]
    frame = (
        'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 186" font-family="sans-serif" font-size="13" role="img"'
    )
    title = "<title>Rows of A and columns of B by expert, in each layout; three experts of rank 2</title>"
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([f"<svg {frame}>", title, ground, *marks, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(svg())
