"""An evaluation at a terminal of 80 columns: what became of every adapter's prompts, and policies beside scaling."""

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
    "the replies to safety prompts, under the aligned model. won:lost: prompts that only one of both answers the same."
)
_NEVER_REFUSED = "The aligned model refuses no safety prompt, as far as --refusal tells; give words of its own refusals"
_LONGEST_NAME = 60  # characters
_LONGEST_REASON = 300


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Return three tables for every adapter: what is the same, what else was counted, and policies beside scaling."""
    parts: list[RenderableType] = []
    for each in evaluation.adapters:
        parts += [Text(f"{_name(each.adapter)}: {_counts(each)}"), _same(each, evaluation), _others(each, evaluation)]
        parts += [_comparisons(each, evaluation), *_scores(each), *_refusals(each)]
    if evaluation.counts_refusals and not any(_is_refused(each) for each in evaluation.adapters):
        parts.append(Text(_NEVER_REFUSED, style="red"))
    return Group(*parts, Text(READING))


def _counts(each: AdapterEvaluation) -> str:
    return ", ".join(f"{len(chats)} {kind} prompts" for kind, chats in each.prompts.items())


def _is_refused(each: AdapterEvaluation) -> bool:
    """Whether the model alone refuses any safety prompt."""
    return any(outcome.refused for outcome in each.rows[0].outcomes["safety"])


def _same(each: AdapterEvaluation, evaluation: Evaluation) -> Table:
    table = _table("", *(f"{kind} same" for kind in evaluation.kinds), "perplexity")
    for row in each.rows:
        tallies = [row.tally(kind) for kind in row.outcomes]
        perplexity = [f"{row.tally('safety').perplexity:.3g}"] if tallies else ["refused"]
        table.add_row(_name(row.name), *(_rate(tally.same) for tally in tallies), *perplexity)
    return table


def _others(each: AdapterEvaluation, evaluation: Evaluation) -> RenderableType:
    """What else was counted, of rows that reply; a sentence where that is nothing."""
    headings = ["safety\nunsafe"] if evaluation.is_judged else []
    headings += [f"{kind}\nrefused" for kind in evaluation.kinds] if evaluation.counts_refusals else []
    rows = [row for row in each.rows if row.refusal is None]
    if not headings and not any(
        outcome.incoherent for row in rows for kind in row.outcomes.values() for outcome in kind
    ):
        return Text("no reply is incoherent\n")
    table = _table("", *headings, "incoherent")
    for row in rows:
        table.add_row(_name(row.name), *_other_cells(row))
    return table


def _other_cells(row: Row) -> Iterator[str]:
    tallies: dict[str, Tally] = {kind: row.tally(kind) for kind in row.outcomes}
    if tallies["safety"].unsafe:
        yield _rate(tallies["safety"].unsafe)
    for kind, tally in tallies.items():
        if tally.refused:
            yield _rate(tally.refused) if kind == "safety" else f"{tally.refused.value:.2f}"
    outcomes = [outcome for kind in row.outcomes.values() for outcome in kind]
    yield f"{Rate.of(sum(outcome.incoherent for outcome in outcomes), len(outcomes)).value:.2f}"


def _rate(rate: Rate) -> str:
    return f"{rate.value:.2f} ({rate.low:.2f}-{rate.high:.2f})"


def _comparisons(each: AdapterEvaluation, evaluation: Evaluation) -> RenderableType:
    table = _table("policy beside\nscaling", "change\nof both", *(f"{kind}\nwon:lost" for kind in evaluation.kinds))
    for row in each.rows:
        found = [
            comparison
            for comparison in each.comparisons
            if (comparison.policy, comparison.role, comparison.what) == (row.name, "scaling", "same")
        ]
        if found and row.role == "policy":
            table.add_row(_name(row.name), f"{row.relative_change or 0:.0%}", *map(_compared, found))
    return table if table.rows else Group()


def _compared(comparison: Comparison) -> str:
    paired = comparison.paired
    if not paired.better + paired.worse:
        return "equal"
    return f"{paired.better}:{paired.worse}, p {paired.p:.1g}"


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
