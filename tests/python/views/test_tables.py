"""Tables fit a terminal of 80 columns, and no name breaks a line of them."""

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

import factories
from csulora.evaluation.evaluation import AdapterEvaluation, Comparison, Evaluation, Row
from csulora.evaluation.outcomes import Outcome
from csulora.evaluation.statistics import Paired
from csulora.extraction.verification import Verification
from csulora.tuning.frontier import Frontier, Point, Rate, Refusals
from csulora.views import tables
from csulora.views.evaluation_table import evaluation_table

KINDS = ("safety", "task", "general")
COUNT = 40


def lines_of(table: RenderableType) -> list[str]:
    """What a terminal of 80 columns shows; a cell that was cut or folded would have fewer characters."""
    console = Console(width=80, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def point(name: str, family: str, general: Rate | None, refusals: Refusals | None) -> Point:
    share = Rate.of(13, COUNT)
    control = family == "scaling"
    return Point(family, name, control, share, share, 0.3664, refusals, general, validation=share)


@pytest.mark.parametrize("general", [None, Rate.of(13, COUNT)])
@pytest.mark.parametrize("refusals", [None, Refusals(Rate.of(39, COUNT), Rate.of(1, COUNT))])
def test_a_frontier_fits(general: Rate | None, refusals: Refusals | None) -> None:
    names = {"tuned 8": "tuned", "x0.2": "scaling", "tuned everywhere 30": "tuned everywhere"}
    points = tuple(point(name, family, general, refusals) for name, family in names.items())
    lines = lines_of(tables.frontier_table(Frontier("0" * 64, ("a",), points, "tuned 8", "tuned 8", "")))
    (at,) = [number for number, line in enumerate(lines) if line.startswith("tuned 8 ")]
    assert lines[at].count("0.33") == 3 + (general is not None)
    assert lines[at + 1].startswith("recommended ")
    assert lines[at + 1].count("0.20-0.48") == 2 + (general is not None)
    assert any(line.startswith("control ") for line in lines)


def evaluation(is_judged: bool) -> Evaluation:
    outcomes = {
        kind: tuple(
            Outcome("text", 12.34, number % 3 == 0, False, number % 2 == 0, number % 5 == 0 if is_judged else None)
            for number in range(COUNT)
        )
        for kind in KINDS
    }
    names = {"model alone": "model", "raw": "raw", "my\npolicy": "policy", "scaling x0.63": "scaling"}
    rows = tuple(
        Row(name, role, "my\npolicy" if role in ("policy", "scaling") else None, 0.37, None, outcomes, {})
        for name, role in names.items()
    )
    compared = tuple(
        Comparison("my\npolicy", "scaling x0.63", "scaling", kind, "same", Paired.of([True] * 9, [False] * 9))
        for kind in KINDS
    )
    prompts = {kind: tuple(({"role": "user", "content": str(number)},) for number in range(COUNT)) for kind in KINDS}
    return Evaluation("m", "0" * 64, (AdapterEvaluation("a", "0" * 64, prompts, rows, compared),))


@pytest.mark.parametrize("is_judged", [False, True])
def test_an_evaluation_fits(is_judged: bool) -> None:
    lines = lines_of(evaluation_table(evaluation(is_judged)))
    same, others, compared = (line for line in lines if line.startswith(r"my\npolicy "))
    assert same.split("  ")[-1].strip() == "12.3"
    assert same.count("0.35 (0.22-0.50)") == len(KINDS)
    assert others.split()[-3:] == ["0.50", "0.50", "0.00"]
    assert ("0.20 (0.10-0.35)" in others) is is_judged
    assert compared.count("9:0, p 0.004") == len(KINDS)


def test_an_evaluation_without_refusals_and_policies_has_no_empty_tables() -> None:
    whole = evaluation(is_judged=False)
    first = whole.adapters[0]
    outcomes = {
        kind: tuple(replace(outcome, refused=None) for outcome in every)
        for kind, every in first.rows[0].outcomes.items()
    }
    rows = tuple(replace(row, outcomes=outcomes) for row in first.rows[:2])
    lines = lines_of(evaluation_table(replace(whole, adapters=(replace(first, rows=rows, comparisons=()),))))
    assert "no reply is incoherent" in lines
    assert sum("───" in line for line in lines) == 1


def test_a_subspace_and_its_verification_fit() -> None:
    name = "model.layers.31.self_attn.q_proj"
    subspace = factories.subspace({name: (64, 48)})
    certificate = replace(subspace[name].certificate, above_noise=4096, standing_out=256, subspace_error=1.1e-5)
    (row,) = [line for line in lines_of(tables.subspace_table(subspace)) if line.startswith("q_proj")]
    assert "64 x 48" in row
    claimed, measured = lines_of(tables.verification_table([Verification(name, certificate, certificate, True)]))[-2:]
    assert claimed.startswith(name[:20])  # a long name is folded, and no figure is
    assert claimed.split()[2] == measured.split()[-4] == "90.0000%"
