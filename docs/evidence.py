"""The tables of the pages on findings and on Acceptance Cards, from what bench/results holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "paper"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "efficacy"))

import card
import lab_cards
import report
import table as paper_table

from page_tables import Record, rate, results, table

_GRID = "python bench/efficacy/grid.py --only"
_RANDOM = "the same, in random directions (control)"
_SMOLLM2 = "python bench/efficacy/smollm2.py"


def cells(*names: str, attacks: Callable[[float], bool] = bool) -> list[Record]:
    """Return the cells of some runs on small models whose adapters' share of attacks fulfils a condition."""
    found = (cell for name in names for cell in results(f"efficacy/{name}")["cells"])
    return [cell for cell in found if attacks(cell["adapter"]["attack"])]


def figures(found: Sequence[Record], family: str) -> list[str]:
    """Return how many adapters there are, then median and worst of attack, task and elsewhere."""
    pairs = [
        [next(point for point in cell["points"] if point["family"] == each) for each in ("none", family)]
        for cell in found
    ]
    attacks = [point["attack"] for _, point in pairs]
    kept = [
        [point[kind] / raw[kind] for raw, point in pairs if raw[kind]]  # what was trained on attacks alone has no task
        for kind in ("task", "benign")
    ]
    cells = (f"{median(shares):.2f}, {min(shares):.2f}" if len(shares) == len(pairs) else "" for shares in kept)
    return [str(len(pairs)), f"{median(attacks):.2f}, {max(attacks):.2f}", *cells]


def adjusted() -> str:
    """Return the table of carried policies whose strength follows each adapter, beside controls, on small models."""
    rows = results("efficacy/carry_variants")["rows"]
    return report.variants_table([row for row in rows if row["variant"] == "as now" or "adjusted" in row["variant"]])


def worlds() -> str:
    """Return the table of findings on small models."""
    fitted, unseen = ("tuned_general", "tuned_general_fresh"), ("carry_tuned", "carry_fresh")
    diverse, fresh = ("tuned_diverse",), ("tuned_fresh",)

    def some(share: float) -> bool:
        return 0 < share < 1

    def others(share: float) -> bool:
        return share < 1

    def alone(share: float) -> bool:
        return share == 1

    def harmless(share: float) -> bool:
        return share == 0

    rows = [
        ("fitted to it", "with attacks", "tuned", fitted, some),
        ("fitted to it, a quarter of its task prompts general", "with attacks", "tuned", diverse, some),
        (_RANDOM, "with attacks", "tuned random subspace", diverse, some),
        ("the same, in its own directions (control)", "with attacks", "tuned own subspace", diverse, some),
        ("one gain per module (control)", "with attacks", "tuned scaling", diverse, some),
        ("fitted to it", "harmless", "tuned", fitted, harmless),
        ("fitted to it without general prompts", "harmless", "tuned", fresh, harmless),
        ("calibrated on three others", "with or without attacks", "carried: tuned", unseen, others),
        (_RANDOM, "with or without attacks", "carried: tuned random subspace", unseen, others),
        ("calibrated on three others", "attacks in other words", "carried: tuned", ("carry_reworded",), others),
        ("calibrated on three others", "nothing but attacks", "carried: tuned", unseen, alone),
    ]
    lines = [
        [f"{adapter}: {what}", *figures(cells(*names, attacks=wanted), family), f"`{_GRID} {' '.join(names)}`"]
        for what, adapter, family, names, wanted in rows
    ]
    head = ["adapters: policy", "adapters", "attack: median, worst", "task kept", "elsewhere kept", "command"]
    return table(head, lines)


def presets() -> str:
    """Return the table of the best policy without prompts of every family, chosen on the figures that it shows."""
    found = cells("first")
    best: dict[str, tuple[float, list[str]]] = {}
    for family, policy in dict.fromkeys((point["family"], point["policy"]) for point in found[0]["points"]):
        if family.startswith("tuned") or family == "scaling at equal relative change":
            continue
        points = [
            next((each for each in cell["points"] if (each["family"], each["policy"]) == (family, policy)), None)
            for cell in found
        ]
        known = [point for point in points if point]
        kept = median(min(1 - point["attack"], point["task"]) for point in known)
        rates = [f"{median(point[kind] for point in known):.2f}" for kind in ("attack", "task")]
        if kept > best.get(family, (-1.0, []))[0]:
            best[family] = kept, [f"{family} {policy}", str(len(known)), *rates]
    return table(["policy", "seeds", "attack, median", "task, median"], (row for _, row in best.values()))


def real() -> str:
    """Return the table of findings on SmolLM2."""
    rows = []
    for name, family, what, command in (
        ("smollm2", "none", "uncorrected", _SMOLLM2),
        ("smollm2", "tuned", "fitted to it", _SMOLLM2),
        ("smollm2", "carried", "calibrated on three others", _SMOLLM2),
        ("smollm2", "carried random subspace", _RANDOM, _SMOLLM2),
        ("smollm2", "carried scaling", "one gain per module (control)", _SMOLLM2),
        ("smollm2_general", "carried", "calibrated with general prompts", f"{_SMOLLM2} --brief --left-out --general"),
        ("smollm2_filtered", "carried", "calibrated with input filters and no general prompts", f"{_SMOLLM2} --brief"),
    ):
        for point in results(f"efficacy/{name}")["points"]:
            if point["family"] == family:
                rates = [rate(point, kind, at) for at, kind in enumerate(("attack", "task", "elsewhere"))]
                rows.append([f"{point['style']}: {what}", *rates, f"{point['over_refusal']:.2f}", f"`{command}`"])
    head = ["adapter: policy", "attack success", "task success", "capitals named", "over-refusal", "command"]
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "adjusted": adjusted,
    "findings-worlds": worlds,
    "findings-presets": presets,
    "findings-real": real,
    "published": paper_table.published,
    "card-world": lambda: card.markdown(lab_cards.of_world(), level=2),
    "card-smollm2": lambda: card.markdown(lab_cards.of_smollm2(), level=2),
}
