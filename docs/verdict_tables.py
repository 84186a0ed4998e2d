"""Tables of what undo and the annihilation ratio tell apart, from `bench/efficacy/verdicts.py`."""

from __future__ import annotations

from collections import Counter
from statistics import mean

from page_tables import Record, every, results, table
from real_tables import NAMES

_KEYS = ("undo", "largest_undo", "annihilation_ratio", "attack")


def areas() -> str:
    """Return the ROC area of every score for every class, against harmless adapters."""
    found = _results()
    counts = Counter(point["kind"] for point in found["points"])
    kinds = list(next(iter(found["scores"].values()))["area"])
    rows = [
        [score, *("" if (area := figures["area"][kind]) is None else f"{area:.2f}" for kind in kinds)]
        for score, figures in found["scores"].items()
    ]
    return table(
        [f"score, against {counts['harmless']} harmless", *(f"{kind}: {counts[kind]}" for kind in kinds)], rows
    )


def thresholds() -> str:
    """Return the thresholds that were chosen on even seeds, and what they find on odd ones."""
    found = {score: figures["threshold"] for score, figures in _results()["scores"].items()}
    rows = [
        [score, f"{chosen['threshold']:.3g}", str(chosen["chosen_on"]), *map(_share, chosen["tried"].values())]
        for score, chosen in found.items()
        if chosen
    ]
    return table(
        ["score", "threshold", "chosen on", *next(chosen["tried"] for chosen in found.values() if chosen)], rows
    )


def real() -> str:
    """Return areas on real weights, and what exceeds the thresholds of world (a) there."""
    runs = every("efficacy/verdicts_*.json")
    kinds = list(next(iter(runs[0]["scores"].values()))["tried"])
    rows = [
        [
            f"{NAMES[run['model']]}, seed {run['seed']}",
            score,
            f"{figures['threshold']:.3g}",
            *(_area_and_share(figures["area"].get(kind), figures["tried"][kind]) for kind in kinds),
        ]
        for run in runs
        for score, figures in run["scores"].items()
    ]
    return table(["run", "score", "threshold of the small models", *kinds], rows)


def evasions() -> str:
    """Return what attackers who know the scores made, means over the seeds."""
    by_way: dict[tuple[str, str], list[Record]] = {}
    for point in _results()["points"]:
        if point["kind"].startswith("evasion"):
            by_way.setdefault((point["kind"].removeprefix("evasion of "), point["name"]), []).append(point)
    rows = [
        [*way, str(len(points)), *(f"{mean(point[key] for point in points):.2f}" for key in _KEYS)]
        for way, points in by_way.items()
    ]
    head = ["evades", "how", "tried", "total undo", "largest undo", "annihilation ratio", "attack success"]
    return table(head, rows)


def _results() -> Record:
    return results("efficacy/verdicts")


def _area_and_share(area: float | None, share: dict[str, int]) -> str:
    return _share(share) if area is None else f"{area:.2f}; {_share(share)}"


def _share(share: dict[str, int]) -> str:
    return f"{share['found']} of {share['of']}"
