"""What the scripts that make tables share: Markdown tables, and the figures under bench/results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from csulora.tuning.frontier import Rate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
Record = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def results(name: str) -> Record:
    """Read one file of results, by its path below bench/results without suffix."""
    document: Record = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def every(pattern: str) -> list[Record]:
    """Read all files of results whose path below bench/results matches a glob, in order of names."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(pattern))]


def rate(point: Record, kind: str, at: int) -> str:
    """Return a rate with Wilson's 95 % interval."""
    count = point["counts"][at]
    return str(Rate.of(round(point[kind] * count), count))
