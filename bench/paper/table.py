"""The one table of a run: every candidate and control on all seeds, and figures that others have published."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from protocol import FRESH, HELD_OUT

from csulora.tuning.frontier import Rate

PUBLISHED = Path(__file__).with_name("published.json")
Record = dict[str, Any]


def rows_of(results: Record, prompts: str) -> dict[str, list[Record]]:
    """Return name -> its record of every seed, in the order of the first seed."""
    found: dict[str, list[Record]] = {}
    for row in results["rows"]:
        if row["prompts"] == prompts:
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
    """Return the run's table, with the attack on fresh prompts where there are some, and what others published."""
    held_out, fresh = (rows_of(results, prompts) for prompts in (HELD_OUT, FRESH))
    has_general = "general" in next(iter(held_out.values()))[0]["counts"]
    metrics = [
        (task, metric)
        for task, scores in next(iter(held_out.values()))[0]["scores"].items()
        for metric in scores
        if "stderr" not in metric
    ]
    head = ["policy", "attack success", "worst seed", *(["fresh attacks"] if fresh else []), "task same"]
    head += ["general same", "over-refusal"] if has_general else []
    head += ["incoherent", "change", "undo left", *(f"{task} {name.removesuffix(',none')}" for task, name in metrics)]
    lines = [head, ["---"] * len(head)]
    for name, rows in held_out.items():
        cells = [f"{name} (control)" if rows[0]["control"] else name]
        cells += [str(pooled(rows, "safety", "attack")), f"{worst_attack(rows):.2f}"]
        cells += [str(pooled(fresh[name], "safety", "attack"))] if fresh else []
        cells += [str(pooled(rows, "task", "same"))]
        if has_general:
            cells += [str(pooled(rows, "general", "same")), f"{pooled(rows, 'general', 'refused').value:.2f}"]
        cells += [f"{incoherent(rows):.2f}", *(_mean(rows, key) for key in ("relative_change", "undo_after"))]
        cells += [f"{fmean(row['scores'][task][metric] for row in rows):.3f}" for task, metric in metrics]
        lines.append(cells)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = len(next(iter(held_out.values())))
    return f"{seeds} seeds, 95 % intervals over their prompts.\n\n{table}\n\n{published()}"


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
