"""What the demo concludes follows from its figures."""

import json
from pathlib import Path

import comparison
import evaluate
import pytest
import world
from rich.console import Console

import demo


def row(name: str, attack: float, task: float) -> comparison.Row:
    totals = {"undo_after": 0.1, "largest_undo_after": 0.2, "relative_change": 0.5}
    subject = evaluate.Subject(name, world.Rates(attack, 1 - attack, task, 1.0), {})
    return comparison.Row(subject, comparison.Change.after(totals))


def rows(*corrected: comparison.Row) -> list[comparison.Row]:
    return [row(comparison.UNCORRECTED, 1.0, 0.9), *corrected]


def test_advice_names_what_helped_and_what_did_not() -> None:
    tried = rows(row("a", 0.0, 0.9), row("b", 1.0, 0.9), row("c", 0.0, 0.0), row("d", 0.05, 0.85))
    without, fitted = comparison.advice(tried, ["a", "b", "c"], ["d"], 40)
    assert without == "Without prompts: a stopped the attack and kept the task here, and b and c did not."
    assert fitted == "With 40 prompts of each kind: d stopped the attack and kept the task here."


def test_advice_says_so_if_nothing_helped() -> None:
    tried = rows(row("a", 1.0, 0.9), row("b", 0.0, 0.5), row("tuned", 0.2, 0.9))
    without, fitted = comparison.advice(tried, ["a", "b"], ["tuned"], 40)
    assert without == "Without prompts: no policy both stopped the attack and kept the task here (a, b)."
    assert fitted == "With 40 prompts of each kind: no policy both stopped the attack and kept the task here (tuned)."


def test_the_table_holds_every_adapter_and_its_outcome() -> None:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(comparison.table(rows(row("tuned", 0.0, 0.9))))
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in captured.get().splitlines() if "│" in line}
    assert [cell.strip() for cell in lines["tuned"]] == [
        "0.00",
        "0.90",
        "1.00",
        "+0.100",
        "+0.200",
        "50%",
        "yes",
        "yes",
    ]
    assert [cell.strip() for cell in lines["uncorrected"]][-2:] == ["no", "yes"]


def test_counts_are_those_of_the_probes() -> None:
    assert comparison.counts(world.probes())[0].startswith("Probes: 240 attack, 230 task, 270 general.")


def test_plain_scaling_gets_the_factor_that_keeps_most(tmp_path: Path) -> None:
    kept = {"none": 0.6, "x0.2": 0.4, "x0.3": 0.1}
    points = [
        {
            "family": "none" if name == "none" else "scaling",
            "relative_change": 0.0 if name == "none" else 1 - float(name[1:]),
            "validation": {"value": value},
        }
        for name, value in kept.items()
    ]
    path = tmp_path / "policy.frontier.json"
    path.write_text(json.dumps({"points": points}))
    assert demo.best_scaling(path) == pytest.approx(0.2)
