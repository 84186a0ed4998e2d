"""Tables (Markdown, on stdout) and plots (SVG, beside the results) of what `grid.py` wrote.

    python bench/efficacy/report.py [--results DIR]

Intervals hold 95 % of 2000 bootstrap samples over seeds and, within a seed, over prompts. The area of a family is
that under the most task accuracy, as a share of the uncorrected adapter's, that any of its policies keeps at every
level of safety (1 - attack success); 1 is perfect, and leaving the adapter alone is always among the choices.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csulora.cli.adjust import LEAST
from csulora.io.files import write_text

RESULTS = Path(__file__).parent.parent / "results" / "efficacy"
SAMPLES = 2000
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#777777", "#000000")
Record = dict[str, Any]
REPORTED = ("safety", "task", "general")  # shares of the test split's prompts, as `tune` names them
WORST = (max, min, min)  # of attack, task and elsewhere
COUNTED = {"attack": 0, "refusal": 0, "task": 1, "benign": 2, "over_refusal": 2, "agreement": 2}  # index into counts


def cells(results: Path, kind: str) -> list[Record]:
    """The finished cells of a kind."""
    path = results / f"{kind}.json"
    found: list[Record] = json.loads(path.read_text())["cells"] if path.is_file() else []
    return found


def uncorrected(cell: Record) -> Record:
    """The point of the adapter as it came."""
    return next(point for point in cell["points"] if point["family"] == "none")


def interval(points: Sequence[Record], rate: str) -> str:
    """Mean of a rate over cells, with its bootstrap interval."""
    random = np.random.default_rng(0)
    rates = np.array([point[rate] for point in points])
    drawn = random.integers(len(rates), size=(SAMPLES, len(rates)))
    counts = np.array([point["counts"][COUNTED[rate]] for point in points])
    means = (random.binomial(counts[drawn], rates[drawn]) / counts[drawn]).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{rates.mean():.2f} ({low:.2f} to {high:.2f})"


def by_policy(found: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Family and policy -> its points in all cells. A scaling to equal relative change has another factor in each."""
    points: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for cell in found:
        for point in cell["points"]:
            name = "" if point["family"] == "scaling at equal relative change" else point["policy"]
            points[point["family"], name].append(point)
    return points


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def rates_table(found: Sequence[Record], wanted: Callable[[str, str], bool] = lambda family, policy: True) -> str:
    """Every policy with its rates, means over the cells."""
    rows = []
    for (family, policy), points in by_policy(found).items():
        if wanted(family, policy):
            means = [
                float(np.mean([point[column] for point in points])) for column in ("relative_change", "perplexity")
            ]
            rates = [interval(points, rate) for rate in ("attack", "refusal", "task", "benign", "agreement")]
            over = float(np.mean([point["over_refusal"] for point in points]))
            rows.append([f"{family} {policy}".strip(), f"{means[0]:.2f}", *rates, f"{over:.2f}", f"{means[1]:.2f}"])
    return table(
        [
            "policy",
            "relative change",
            "attack",
            "refusal",
            "task",
            "elsewhere",
            "as aligned",
            "over-refusal",
            "perplexity",
        ],
        rows,
    )


def seeds_table(found: Sequence[Record], families: Sequence[str]) -> str:
    """Attack / task / elsewhere of every cell, the last two as shares of the uncorrected adapter's."""
    measured = {point["family"] for point in found[0]["points"]}
    families, rows = [family for family in families if family in measured], []
    for cell in found:
        plain, adapter, scenario = uncorrected(cell), cell["adapter"], cell["scenario"]
        name = f"seed {scenario['seed']}{', format' if scenario['formats'] else ''}: {adapter['task']}, "
        name += f"{adapter['attack']:.0%}, r {adapter['rank']}"
        row = [name, f"{plain['attack']:.2f} / {plain['task']:.2f} / {plain['benign']:.2f}"]
        for family in families:
            point = next(point for point in cell["points"] if point["family"] == family)
            row.append(f"{point['attack']:.2f} / {_share(point, plain, 'task')} / {_share(point, plain, 'benign')}")
        rows.append(row)
    return table(["adapter", "uncorrected", *families], rows)


def reported_table(found: Sequence[Record]) -> str:
    """What `tune` itself reports of every cell on the test split, which chose nothing; "-": without such prompts."""
    rows = []
    for cell in found:
        shares = ("-" if cell["tune"][kind] is None else f"{cell['tune'][kind]:.2f}" for kind in REPORTED)
        rows.append([f"seed {cell['scenario']['seed']}: {cell['adapter']['task']}", *shares])
    return table(["adapter", *REPORTED], rows)


def adapters_table(found: Sequence[Record]) -> str:
    """Attack / refusal / task of every adapter under every policy, means over the seeds."""
    of_adapter: dict[str, list[Record]] = defaultdict(list)
    for cell in found:
        adapter = cell["adapter"]
        of_adapter[f"{adapter['task']}, {adapter['attack']:.0%}, r {adapter['rank']}"].append(cell)
    adapters = {name: by_policy(cells) for name, cells in of_adapter.items()}
    rows = []
    for family, policy in by_policy(found):
        row = [f"{family} {policy}".strip()]
        for points in adapters.values():
            means = [
                np.mean([point[rate] for point in points[family, policy]]) for rate in ("attack", "refusal", "task")
            ]
            row.append(" / ".join(f"{mean:.2f}" for mean in means))
        rows.append(row)
    return table(["attack / refusal / task", *adapters], rows)


def _share(point: Record, plain: Record, rate: str) -> str:
    return f"{point[rate] / plain[rate]:.2f}" if plain[rate] >= 0.5 else "-"


def carry_table(found: Sequence[Record]) -> str:
    """Median and worst of attack and task over the adapters that a calibration never saw; all-attack ones apart."""
    rows = []
    tasked = [cell for cell in found if cell["adapter"]["attack"] < 1]
    plain = [uncorrected(cell) for cell in tasked]
    for (family, policy), points in by_policy(tasked).items():
        attack = [point["attack"] for point in points]
        task = [point["task"] / reference["task"] for point, reference in zip(points, plain, strict=True)]
        pure = [
            point["attack"]
            for cell in found
            if cell["adapter"]["attack"] == 1
            for point in cell["points"]
            if (point["family"], point["policy"]) == (family, policy)
        ]
        figures = (np.median(attack), max(attack), np.median(task), min(task), np.mean(pure))
        rows.append([f"{family} {policy}".strip(), *(f"{figure:.2f}" for figure in figures)])
    return table(["policy", "attack: median", "worst", "task kept: median", "worst", "attack of a pure attack"], rows)


def variants_table(rows: Sequence[Record]) -> str:
    """Median and worst of every variant over the adapters that it never saw, and the worst of those not refused."""
    found = []
    for row in rows:
        figures = [_unseen_figures(each) for each in row["adapters"]]
        refused = [_is_refused(row, each) for each in row["adapters"]]
        cells = [
            f"{np.median(each):.2f} / {worst(each):.2f}"
            for worst, each in zip(WORST, zip(*figures, strict=True), strict=True)
        ]
        others = zip(*(each for each, out in zip(figures, refused, strict=True) if not out), strict=True)
        left = " / ".join(f"{worst(each):.2f}" for worst, each in zip(WORST, others, strict=True))
        found.append([str(row["seed"]), row["variant"], *cells, f"{sum(refused)} of {len(refused)}", left])
    return table(["seed", "variant", "attack", "task", "elsewhere", "refused", "worst of others"], found)


def _unseen_figures(each: Record) -> tuple[float, float, float]:
    """Attack, task and elsewhere of an adapter, the last two as shares of the uncorrected one's."""
    point, plain = each["point"], each["raw"]
    return point["attack"], point["task"] / plain["task"], point["benign"] / plain["benign"]


def _is_refused(row: Record, each: Record) -> bool:
    """Whether `csulora adjust` refuses an adapter by its default, or the limit on undo, where it was not asked."""
    return bool(min(each["kept"]) < LEAST if "kept" in each else each["raw"]["undo"] > row["undo_limit"])


def area(cell: Record, family: str) -> float:
    """Area under a family's frontier in one cell."""
    plain = uncorrected(cell)
    points = [plain, *(point for point in cell["points"] if point["family"] == family)]
    levels = np.linspace(0, 1, 201)
    kept = [
        max((p["task"] / plain["task"] for p in points if 1 - p["attack"] >= level - 1e-9), default=0)
        for level in levels
    ]
    return float(np.clip(np.mean(kept), 0, 1))


def area_table(found: Sequence[Record]) -> str:
    """Area under the frontier of every family: mean and bootstrap interval over seeds."""
    random, rows = np.random.default_rng(0), []
    for family in dict.fromkeys(point["family"] for cell in found for point in cell["points"]):
        areas = np.array([area(cell, family) for cell in found])
        means = areas[random.integers(len(areas), size=(SAMPLES, len(areas)))].mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        rows.append([family, f"{areas.mean():.2f} ({low:.2f} to {high:.2f})"])
    return table(["family", "area"], sorted(rows, key=lambda row: row[1], reverse=True))


def plot(found: Sequence[Record], families: Sequence[str], title: str) -> str:
    """Every policy of some families as a point: attack success across, task accuracy up; means over the cells."""
    width, height, left, top = 640, 400, 56, 40
    inner_x, inner_y = width - left - 190, height - top - 56
    marks = [f'<text x="{left}" y="24" font-weight="bold">{title}</text>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + tick * inner_x, top + (1 - tick) * inner_y
        marks.append(f'<path d="M{left} {y:.1f}h{inner_x}M{x:.1f} {top}v{inner_y}" stroke="#ccc"/>')
        marks.append(f'<text x="{x:.1f}" y="{top + inner_y + 18}" text-anchor="middle">{tick:g}</text>')
        marks.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    marks.append(f'<text x="{left + inner_x / 2}" y="{height - 14}" text-anchor="middle">attack success</text>')
    marks.append(
        f'<text transform="translate(14 {top + inner_y / 2}) rotate(-90)" text-anchor="middle">task accuracy</text>'
    )
    points = by_policy(found)
    for at, family in enumerate(families):
        colour = COLOURS[at % len(COLOURS)]
        for (other, policy), same in points.items():
            if other == family:
                attack, task = (float(np.mean([point[rate] for point in same])) for rate in ("attack", "task"))
                x, y = left + attack * inner_x, top + (1 - task) * inner_y
                tip = f"{family} {policy}: {attack:.2f} / {task:.2f}"
                marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{tip}</title></circle>')
        y = top + 14 + 20 * at
        marks.append(f'<circle cx="{width - 176}" cy="{y - 4}" r="5" fill="{colour}"/>')
        marks.append(f'<text x="{width - 164}" y="{y}">{family}</text>')
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    return f'<svg {frame}>\n<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(marks) + "\n</svg>\n"


FITTED = ("tuned", "tuned scaling", "tuned random subspace", "tuned own subspace", "scaling at equal relative change")
CLOSED = ("csulora", "project", "protect", "aligned-only", "mixed", "scaling", "random subspace", "safe-lora")

# Kind of results -> what the prompts were, and which seeds.
ALONE = {
    "tuned": "",
    "tuned_fresh": ", on five more seeds",
    "tuned_diverse": ", a quarter of the task prompts general",
    "tuned_general": ", with general prompts",
    "tuned_general_fresh": ", with general prompts, on five more seeds",
}


def tables(results: Path) -> Iterator[str]:
    """Every table of what is there, with its heading."""
    first, carry = cells(results, "first"), cells(results, "carry")
    if first:
        yield f"## First table ({len(first)} seeds)\n\n{rates_table(first)}\n{seeds_table(first, FITTED)}"
        yield f"## Areas\n\n{area_table(first)}"
    for title, found in (
        ("Harmless adapter", cells(results, "harmless")),
        ("Variants", cells(results, "variants")),
        ("Variants, gains of single directions", cells(results, "variants_tuned")),
    ):
        if found:
            yield f"## {title}\n\n{seeds_table(found, FITTED)}"
    for (kind, prompts), (title, attack) in itertools.product(
        ALONE.items(), (("with attacks", True), ("harmless", False))
    ):
        found = [cell for cell in cells(results, kind) if (cell["adapter"]["attack"] > 0) == attack]
        if found:
            yield (
                f"## Gains of single directions, {title}{prompts} ({len(found)} seeds)\n\n"
                f"{rates_table(found)}\n{seeds_table(found, FITTED)}"
            )
            if "tune" in found[0]:
                yield f"What `tune` reports of them on its test split:\n\n{reported_table(found)}"
    for title, second in (("", cells(results, "second")), (", as `tune` does it", cells(results, "second_tuned"))):
        if second:
            others = [cell for cell in second if cell["adapter"] != second[0]["adapter"]]
            yield f"## Second table{title}\n\n{adapters_table(second)}\n{rates_table(others)}"
    for title, found in (
        ("", carry),
        (", as `tune` does it", cells(results, "carry_tuned")),
        (", as `tune` does it, on two more seeds", cells(results, "carry_fresh")),
        (", as `tune` does it, attacks in other wordings than safety prompts", cells(results, "carry_reworded")),
    ):
        if found:
            yield f"## Carried over to {len(found)} adapters{title}\n\n{carry_table(found)}"
    variants = results / "carry_variants.json"
    if variants.is_file():
        yield f"## Carried over, variants\n\n{variants_table(json.loads(variants.read_text())['rows'])}"


def draw(results: Path) -> None:
    """Write the plots of what is there."""
    if first := cells(results, "first"):
        write_text(results / "first.svg", plot(first, ("tuned", *CLOSED[:7]), "Attack and task, first table"))
        write_text(results / "fitted.svg", plot(first, ("none", *FITTED), "Fitted gains and their controls"))
    if carry := cells(results, "carry"):
        ways = sorted({p["family"] for cell in carry for p in cell["points"] if "carried" in p["family"]})[:7]
        write_text(results / "carry.svg", plot(carry, ("none", *ways), "Carried over to adapters never fitted on"))


def main() -> None:
    """Print all tables and draw all plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where grid.py wrote (default: %(default)s)")
    results = parser.parse_args().results
    print("\n".join(tables(results)), end="")
    draw(results)


if __name__ == "__main__":
    main()
