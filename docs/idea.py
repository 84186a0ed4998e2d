"""The picture of the idea: what alignment did, what an adapter does, and what a correction leaves of it.

    python docs/idea.py

Writes docs/pages/idea.svg. Vectors stand for matrices. The horizontal axis is the subspace, in which alignment moved
the weights.
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parent / "pages" / "idea.svg"

Point = tuple[float, float]

_INK, _BLUE, _ORANGE, _GREEN, _GREY = "#1f2328", "#0072b2", "#d55e00", "#009e73", "#8c959f"

_BASE: Point = (70, 230)
_ALIGNED: Point = (360, 230)
_ADAPTED: Point = (220, 90)  # the aligned weights plus the update
_CORRECTED: Point = (338, 104)


def _arrow(start: Point, end: Point, colour: str, dashes: str = "") -> str:
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{start[0]:g}" y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}" stroke="{colour}" '
        f'stroke-width="2.5"{style} marker-end="url(#{colour[1:]})"/>'
    )


def _head(colour: str) -> str:
    return (
        f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
    )


def _text(at: Point, text: str, colour: str = _INK, anchor: str = "middle") -> str:
    return f'<text x="{at[0]:g}" y="{at[1]:g}" fill="{colour}" text-anchor="{anchor}">{text}</text>'


def _dot(at: Point) -> str:
    return f'<circle cx="{at[0]:g}" cy="{at[1]:g}" r="4" fill="{_INK}"/>'


def svg() -> str:
    """Return the picture."""
    inside: Point = (_ADAPTED[0], _ALIGNED[1])
    marks = [
        f'<line x1="20" y1="230" x2="640" y2="230" stroke="{_GREY}" stroke-dasharray="2 5"/>',
        _text((640, 220), "subspace of the alignment", _GREY, "end"),
        _arrow(_BASE, _ALIGNED, _BLUE),
        _text((145, 218), "displacement D", _BLUE),
        _arrow(_ALIGNED, _ADAPTED, _ORANGE),
        _text((246, 82), "update dW of the adapter", _ORANGE, "start"),
        _arrow((_ALIGNED[0], 242), (inside[0], 242), _ORANGE, "6 4"),
        _text((282, 264), "inside: undoes D", _ORANGE),
        _arrow(inside, _ADAPTED, _ORANGE, "6 4"),
        _text((210, 160), "outside", _ORANGE, "end"),
        _arrow(_ALIGNED, _CORRECTED, _GREEN),
        _text((362, 140), "corrected update X: a policy scales each part", _GREEN, "start"),
        *map(_dot, (_BASE, _ALIGNED)),
        _text((_BASE[0], 252), "W_base"),
        _text((_ALIGNED[0] + 8, 252), "W_aligned", anchor="start"),
    ]
    frame = (
        'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 280" font-family="sans-serif" font-size="15" role="img"'
    )
    title = "<title>An adapter's update is split inside and outside the alignment's subspace, and corrected</title>"
    heads = "<defs>" + "".join(map(_head, (_BLUE, _ORANGE, _GREEN))) + "</defs>"
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([f"<svg {frame}>", title, heads, ground, *marks, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(svg())
