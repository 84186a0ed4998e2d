import json
import math

import pytest
import torch
from rich.console import Console, RenderableType

import factories
import oracle
from csulora import Policy, correct
from csulora.correction.report import Report
from csulora.extraction.verification import Verification
from csulora.views import tables

pytestmark = pytest.mark.usefixtures("one_thread")

DOWN, UP, Q = sorted(factories.SHAPES)


def report_of(policy: Policy | None = None, subspace_shapes: dict[str, tuple[int, int]] = factories.SHAPES) -> Report:
    return correct(factories.adapter(), factories.subspace(subspace_shapes), policy)[1]


def printed(table: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_totals_are_those_of_one_block_diagonal_update() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    fixed, report = correct(adapter, subspace, Policy.csulora(3.0, rank=3))
    updates = {name: oracle.update(module.b, module.a, module.scale) for name, module in adapter.modules.items()}
    wanted = {
        name: oracle.closest_safe_update(dw, subspace[name].u, subspace[name].v, (0, 3, 3))
        for name, dw in updates.items()
    }

    def norm2(matrices: list[torch.Tensor]) -> float:
        return sum(float(matrix.square().sum()) for matrix in matrices)

    names, totals = list(updates), report.totals
    size2 = norm2(list(updates.values()))
    assert totals.norm == pytest.approx(math.sqrt(size2), rel=1e-6)
    assert totals.relative_change == pytest.approx(
        math.sqrt(norm2([wanted[n] - updates[n] for n in names]) / size2), rel=1e-5
    )
    stored = {name: oracle.update(module.b, module.a) for name, module in fixed.modules.items()}
    cut = norm2([wanted[n] - stored[n] for n in names]) / norm2([wanted[n] for n in names])
    assert totals.truncation_error == pytest.approx(cut, rel=1e-4)
    splits = [oracle.split(updates[n], subspace[n].u, subspace[n].v) for n in names]
    for component, share in totals.energies.items():
        assert share == pytest.approx(norm2([split.components[component] for split in splits]) / size2, rel=1e-5)
    alignments = [(subspace[n].u * subspace[n].s).double() @ subspace[n].v.double().t() for n in names]
    products = [float((updates[n] * alignment).sum()) for n, alignment in zip(names, alignments, strict=True)]
    assert totals.undo == pytest.approx(-sum(products) / norm2(alignments), rel=1e-4)


def test_is_the_same_every_time_and_is_json() -> None:
    first, second = report_of(Policy.project()).to_dict(), report_of(Policy.project()).to_dict()
    assert first == second
    assert json.loads(json.dumps(first, allow_nan=False))["policy"]["off"] == "inf"
    assert [module["status"] for module in first["modules"]] == ["corrected"] * 3


def test_the_worst_undo_is_the_largest() -> None:
    report = report_of()
    assert report.worst_undo is not None
    assert report.worst_undo.undo == max(module.undo for module in report.modules)


def test_tables_show_every_figure_and_say_what_is_not_covered() -> None:
    covered = {name: factories.SHAPES[name] for name in (DOWN, Q)}
    text = printed(report_of(Policy.csulora(1.0, uncovered="keep"), covered).table())
    assert "2 of 3 modules are covered by the subspace file" in text
    assert DOWN in text
    assert UP not in text
    for heading in ("norm", "aligned", "left", "right", "off", "undo", "relative change", "truncation error"):
        assert heading in text


def test_the_table_of_modules_starts_with_the_largest_undo() -> None:
    report = report_of()
    by_undo = sorted(report.modules, key=lambda module: -module.undo)
    shown = [line for line in printed(report.table(limit=2)).splitlines() if "model.layers" in line]
    assert [module.module in line for module, line in zip(by_undo[:2], shown, strict=True)] == [True, True]


def test_the_card_names_everything_it_was_made_from() -> None:
    report = report_of(Policy.csulora(2.0, uncovered="keep"), {Q: factories.SHAPES[Q]})
    card = report.card("org/base")
    assert card.startswith('---\nbase_model: "org/base"\nlibrary_name: peft\n')
    assert "# `adapter`, corrected by csulora" in card
    assert "partial=2.0" in card
    assert "| modules corrected | 1 of 3 |" in card
    assert report.adapter_sha256 in card
    assert report.subspace_sha256 in card


def test_the_card_survives_strange_names() -> None:
    assert 'base_model: "a\\nlicence: mine"\n' in report_of().card("a\nlicence: mine")
    assert "base_model" not in report_of().card(None)


def test_the_subspace_table_shows_the_worst_of_each_kind() -> None:
    subspace = factories.subspace({f"model.layers.{i}.mlp.up_proj": (56 + 8 * i, 40) for i in range(2)})
    (line,) = [line for line in printed(tables.subspace_table(subspace)).splitlines() if "up_proj" in line]
    for figure in ("56 x 40, 64 x 40", "90.0%", "1.0e-03"):
        assert figure in line


def test_the_subspace_table_shows_a_kind_that_did_not_move() -> None:
    assert "0.0%" in printed(tables.subspace_table(factories.subspace({Q: (40, 40)}, rank=0)))


def test_the_adapter_table_shows_shapes_ranks_and_scales() -> None:
    (line,) = [line for line in printed(tables.adapter_table(factories.adapter())).splitlines() if UP in line]
    for figure in ("56 x 40", "4", "2", "float32"):
        assert figure in line


def test_the_verification_table_shows_claim_and_measurement() -> None:
    certificate = factories.subspace()[Q].certificate
    text = printed(tables.verification_table([Verification(Q, certificate, certificate, False)]))
    for figure in (Q, "other", "90.0000% / 90.0000%", "NO"):
        assert figure in text
