"""An evaluation at a terminal: for every adapter what became of the prompts, and policies beside plain scaling."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from csulora.errors import printable
from csulora.evaluation.evaluation import AdapterEvaluation, Comparison, Evaluation, Row
from csulora.evaluation.outcomes import Tally
from csulora.tuning.frontier import Rate

READING = (
    "same: answers as the aligned model (safety), as the raw adapter (task), as one of both (general), with 95 % "
    "intervals. incoherent: share of all replies; they count as neither refusals nor answers. perplexity: median of "
    "the replies to safety prompts, under the aligned model. won, lost: prompts that only one of both answers the same."
)
_LONGEST_NAME = 60  # characters
_LONGEST_REASON = 300


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Return two tables for every adapter: the rows, and every policy beside scaling that changes as much."""
    parts: list[RenderableType] = []
    for each in evaluation.adapters:
        parts += [Text(f"{_name(each.adapter)}: {_counts(each)}"), _rows(each, evaluation)]
        parts += [_comparisons(each, evaluation), *_scores(each), *_refusals(each)]
    return Group(*parts, Text(READING))


def _counts(each: AdapterEvaluation) -> str:
    return ", ".join(f"{len(chats)} {kind} prompts" for kind, chats in each.prompts.items())


def _rows(each: AdapterEvaluation, evaluation: Evaluation) -> Table:
    headings = ["change"]
    for kind in evaluation.kinds:
        headings += [f"{kind} same", *(["refused"] if evaluation.counts_refusals else [])]
        headings += ["unsafe"] if kind == "safety" and evaluation.is_judged else []
    table = _table("", *headings, "incoherent", "perplexity")
    for row in each.rows:
        table.add_row(_name(row.name), *_cells(row))
    return table


def _cells(row: Row) -> Iterator[str]:
    yield "" if row.relative_change is None else f"{row.relative_change:.0%}"
    if row.refusal is not None:
        yield "refused"
        return
    tallies: dict[str, Tally] = {kind: row.tally(kind) for kind in row.outcomes}
    for kind, tally in tallies.items():
        yield str(tally.same)
        if tally.refused:
            yield str(tally.refused) if kind == "safety" else f"{tally.refused.value:.2f}"
        if tally.unsafe:
            yield str(tally.unsafe)
    outcomes = [outcome for kind in row.outcomes.values() for outcome in kind]
    yield f"{Rate.of(sum(outcome.incoherent for outcome in outcomes), len(outcomes)).value:.2f}"
    yield f"{tallies['safety'].perplexity:.3g}"


def _comparisons(each: AdapterEvaluation, evaluation: Evaluation) -> Table:
    table = _table("policy, beside scaling at equal change", *(f"{kind} same" for kind in evaluation.kinds))
    for row in each.rows:
        found = [
            comparison
            for comparison in each.comparisons
            if (comparison.policy, comparison.role, comparison.what) == (row.name, "scaling", "same")
        ]
        if found and row.role == "policy":
            table.add_row(f"{_name(row.name)}, {found[0].versus}", *map(_compared, found))
    return table


def _compared(comparison: Comparison) -> str:
    paired = comparison.paired
    if not paired.better + paired.worse:
        return "equal"
    return f"{paired.difference:+.2f} ({paired.better} won, {paired.worse} lost, p {paired.p:.1g})"


def _scores(each: AdapterEvaluation) -> Iterator[Table]:
    """Metrics of lm-eval, without their standard errors, if there are any."""
    names = [(task, metric) for task, metrics in each.rows[0].scores.items() for metric in metrics]
    shown = [name for name in names if "stderr" not in name[1]]
    if shown:
        table = _table(
            "lm-eval", *(f"{printable(task)} {printable(metric.removesuffix(',none'))}" for task, metric in shown)
        )
        for row in each.rows:
            cells = (row.scores.get(task, {}).get(metric) for task, metric in shown)
            table.add_row(_name(row.name), *("" if value is None else f"{value:.3f}" for value in cells))
        yield table


def _refusals(each: AdapterEvaluation) -> Iterator[Text]:
    for row in each.rows:
        if row.refusal is not None:
            yield Text(f"{_name(row.name)} refuses the adapter: {printable(row.refusal, _LONGEST_REASON)}")


def _name(text: str) -> str:
    return printable(text, _LONGEST_NAME)


def _table(first: str, *rest: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(Text(first), overflow="fold")
    for heading in rest:
        table.add_column(heading, justify="right")
    return table
