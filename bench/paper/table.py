"""The one table of a run: every candidate and control on all seeds, and figures that others have published."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from protocol import FRESH, HELD_OUT, OTHER

from csulora.tuning.frontier import Rate

PUBLISHED = Path(__file__).with_name("published.json")
Record = dict[str, Any]


def rows_of(results: Record, kind: str) -> dict[str, list[Record]]:
    """Return name -> what was measured of it on every adapter, in the order of the first."""
    found: dict[str, list[Record]] = {}
    for row in results["rows"]:
        if row["measured"] == kind:
            found.setdefault(row["name"], []).append(row)
    return found


def attacks(row: Record) -> int:
    """Return how many attacks succeed: replies that the judge calls unsafe, else coherent ones that do not refuse."""
    counts = row["counts"]["safety"]
    found: int = counts.get("unsafe", counts["answered"])
    return found


def pooled(rows: Sequence[Record], kind: str, what: str) -> Rate:
    """Return a rate over the prompts of all seeds."""
    hits = (attacks(row) if what == "attack" else row["counts"][kind][what] for row in rows)
    return Rate.of(sum(hits), sum(row["counts"][kind]["count"] for row in rows))


def worst_attack(rows: Sequence[Record]) -> float:
    """Return the largest attack success of a seed."""
    return max(pooled([row], "safety", "attack").value for row in rows)


def incoherent(rows: Sequence[Record]) -> float:
    """Return the share of replies of all kinds that are incoherent."""
    counts = [counts for row in rows for counts in row["counts"].values()]
    return Rate.of(sum(each["incoherent"] for each in counts), sum(each["count"] for each in counts)).value


def markdown(results: Record) -> str:
    """Return a table of the seeds' adapters, one of another task's adapter if there is one, and others' figures."""
    held_out, fresh, other = (rows_of(results, kind) for kind in (HELD_OUT, FRESH, OTHER))
    seeds = len(next(iter(held_out.values())))
    parts = [f"{seeds} seeds, 95 % intervals over their prompts.", _lines(held_out, fresh)]
    if other:
        parts += ["An adapter for another task; *tuned* was fitted on the adapters above.", _lines(other, {})]
    return "\n\n".join([*parts, published()])


def _lines(measured: dict[str, list[Record]], fresh: dict[str, list[Record]]) -> str:
    """Return a Markdown table with a line for each way to serve the adapters, with their attacks on fresh prompts."""
    first = next(iter(measured.values()))[0]
    metrics = [(task, name) for task, scores in first["scores"].items() for name in scores if "stderr" not in name]
    head = ["policy", "attack success", "worst seed", *(["fresh attacks"] if fresh else []), "task same"]
    head += ["general same", "over-refusal"] if "general" in first["counts"] else []
    head += ["incoherent", "change", "undo left", *(f"{task} {name.removesuffix(',none')}" for task, name in metrics)]
    lines = [head, ["---"] * len(head)]
    for name, rows in measured.items():
        cells = [f"{name} (control)" if rows[0]["control"] else name]
        cells += [str(pooled(rows, "safety", "attack")), f"{worst_attack(rows):.2f}"]
        cells += [str(pooled(fresh[name], "safety", "attack"))] if fresh else []
        cells += [str(pooled(rows, "task", "same"))]
        if "general" in first["counts"]:
            cells += [str(pooled(rows, "general", "same")), f"{pooled(rows, 'general', 'refused').value:.2f}"]
        cells += [f"{incoherent(rows):.2f}", *(_mean(rows, key) for key in ("relative_change", "undo_after"))]
        cells += [f"{fmean(row['scores'][task][metric] for row in rows):.3f}" for task, metric in metrics]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(rows: Sequence[Record], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{fmean(values):.2f}" if values else ""


def published() -> str:
    """Return the table of what others have published, each with its source."""
    document = json.loads(PUBLISHED.read_text())
    head = ["method", "model and task", "harmful, before", "after", "task, before", "after", "source"]
    rows = [_published(entry) for entry in document["figures"]]
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    notes = [f"{entry['method']}: {entry['why']}" for entry in document["left_out"]]
    return "\n".join([document["reading"], "", *lines, "", *notes]) + "\n"


def _published(entry: Record) -> Iterator[str]:
    yield from (entry["method"], entry["setting"])
    yield from (entry[key] for key in ("harmful_before", "harmful_after", "task_before", "task_after"))
    yield f"[{entry['source']}]({entry['address']})"
