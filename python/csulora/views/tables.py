"""Tables for people, at a terminal of 80 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from csulora.errors import printable
from csulora.models.names import parse_expert
from csulora.views.layout import by_number, columns, kind_of

if TYPE_CHECKING:
    from csulora.adapters.lora import Adapter
    from csulora.extraction.verification import Verification
    from csulora.subspace.module_subspace import ModuleSubspace
    from csulora.subspace.subspace import Subspace
    from csulora.tuning.frontier import Frontier, Rate

_LONGEST_CELL = 1000  # characters
_BEST = 5  # policies that are shown if not all are


def subspace_table(subspace: Subspace) -> Table:
    """One row per kind of module, with the worst figures among its layers and experts."""
    kinds: dict[str, list[ModuleSubspace]] = defaultdict(list)
    for name, module in subspace.items():
        kinds[kind_of(name)].append(module)
    headings = ("captured\nenergy", "residual", "standing\nout", "subspace\nerror, up to", "above\nnoise")
    table = plain_table("kind", "n", "shape", "rank", *headings, whole=True)
    for kind, modules in [(column.short, kinds[column.kind]) for column in columns(sorted(kinds, key=by_number))]:
        certificates = [module.certificate for module in modules if module.rank]
        table.add_row(
            kind,
            str(len(modules)),
            ", ".join(sorted({" x ".join(map(str, module.shape)) for module in modules})),
            span([module.rank for module in modules]),
            f"{min((c.captured_energy for c in certificates), default=0.0):.1%}",
            f"{max((c.residual for c in certificates), default=0.0):.1e}",
            span([module.certificate.standing_out for module in modules]),
            f"{max((c.subspace_error for c in certificates), default=0.0):.1e}",
            span([module.certificate.above_noise for module in modules]),
        )
    return table


def verification_table(results: Iterable[Verification]) -> Table:
    """Two lines per module: what the subspace file claims, and below it what was measured."""
    headings = ("weights", "captured\nenergy", "residual", "orthonor-\nmality", "next\nvalue", "holds")
    table = plain_table("module", *headings, whole=True)
    for result in results:
        stored, measured = result.stored, result.measured
        table.add_row(
            result.module,
            "same" if result.same_weights else "other",
            (f"{stored.captured_energy:.4%}", f"{measured.captured_energy:.4%}"),
            (f"{stored.residual:.2e}", f"{measured.residual:.2e}"),
            (f"{stored.orthonormality:.1e}", f"{measured.orthonormality:.1e}"),
            (f"{stored.next_value:.4g}", f"{measured.next_value:.4g}"),
            "yes" if result.holds else "NO",
        )
    return table


def adapter_rows(adapter: Adapter) -> list[dict[str, Any]]:
    """Return what can be said of an adapter's modules without a subspace file."""
    return [
        {
            "module": name,
            "shape": list(module.shape),
            "rank": module.rank,
            "scale": module.scale,
            "dtype": str(module.b.dtype).removeprefix("torch."),
        }
        for name, module in adapter.modules.items()
    ]


def adapter_table(adapter: Adapter, every_module: bool = False) -> Table:
    """One row per module of an adapter; unless ``every_module``, experts have one per projection."""
    table = plain_table("module", "n", "shape", "rank", "scale", "dtype")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in adapter_rows(adapter):
        name = row["module"]
        groups[kind_of(name) if parse_expert(name) and not every_module else name].append(row)
    for name, rows in groups.items():
        shapes = sorted({" x ".join(map(str, row["shape"])) for row in rows})
        scales = sorted({f"{row['scale']:g}" for row in rows})
        dtypes = sorted({row["dtype"] for row in rows})
        ranks = span([row["rank"] for row in rows])
        table.add_row(name, str(len(rows)), ", ".join(shapes), ranks, ", ".join(scales), ", ".join(dtypes))
    return table


def frontier_table(frontier: Frontier, every_policy: bool = True) -> Table:
    """One row per policy with 95 % intervals below the shares, those that the validation split prefers first.

    Unless ``every_policy``, they are the best five and the uncorrected adapter.
    """
    refusals = ("safety\nrefused", "task\nrefused") if frontier.counts_refusals else ()
    general = ("general\nkept",) if frontier.has_general else ()
    headings = ("safety\nkept", "task\nkept", *general, *refusals)
    table = plain_table("policy", "vali-\ndation", *headings, "relative\nchange", whole=True)
    points = sorted(frontier.points, key=lambda point: (-point.choice.value, point.relative_change))
    for place, point in enumerate(points):
        if not every_policy and place >= _BEST and point.policy != "none":
            continue
        mark = "recommended" if point.policy == frontier.recommended else "control" if point.control else ""
        refused = (point.refusals.safety, point.refusals.task) if point.refusals else ()
        generally = (point.general,) if point.general else ()
        rates = map(_in_two_lines, (point.safety, point.task, *generally, *refused))
        table.add_row(
            (point.policy, mark) if mark else point.policy,
            f"{point.choice.value:.2f}",
            *rates,
            f"{point.relative_change:.1%}",
        )
    return table


def _in_two_lines(rate: Rate) -> tuple[str, str]:
    return f"{rate.value:.2f}", f"{rate.low:.2f}-{rate.high:.2f}"


class _Printable(Table):
    """A table whose cells may come from files; a cell of several lines is a tuple."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        lines = (cell if isinstance(cell, tuple) else (cell,) for cell in cells)
        super().add_row(*("\n".join(printable(line, _LONGEST_CELL) for line in cell) for cell in lines), **options)


def plain_table(first: str, *rest: str, whole: bool = False) -> _Printable:
    """Return a table of these columns; what stands in it is made printable.

    Where it is too wide, cells are folded: with ``whole`` those of the first column alone.
    """
    table = _Printable(box=box.SIMPLE_HEAD, padding=(0, 0 if whole else 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for column in rest:
        table.add_column(column, justify="right", no_wrap=whole)
    return table


def span(numbers: Collection[int]) -> str:
    """Return the range of some numbers, or the number that all of them are."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}..{high}"
