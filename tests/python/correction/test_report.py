import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType

import factories
import html_pages
import oracle
from csulora import Policy, correct
from csulora.correction.model_card import model_card
from csulora.correction.report import COMPONENTS, Report, Totals, Verdict
from csulora.errors import InputError
from csulora.extraction.verification import Verification
from csulora.views import tables
from csulora.views.report_table import report_table

pytestmark = pytest.mark.usefixtures("one_thread")

CSULORA = Policy.csulora()
DOWN, UP, Q = sorted(factories.SHAPES)


def report_of(policy: Policy = CSULORA, subspace_shapes: dict[str, tuple[int, int]] = factories.SHAPES) -> Report:
    return correct(factories.adapter(), factories.subspace(subspace_shapes), policy)[1]


def printed(table: RenderableType, width: int = 200) -> str:
    console = Console(width=width)
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


def test_undo_after_is_that_of_the_corrected_update() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    for policy in (Policy.none(), Policy.project(), Policy.protect(2.0), Policy.csulora(5.0, rank=2)):
        fixed, report = correct(adapter, subspace, policy)
        for module in report.modules:
            x = oracle.update(fixed.modules[module.module].b, fixed.modules[module.module].a)
            known = subspace[module.module]
            assert module.undo_after == pytest.approx(oracle.undo(x, known.u, known.s, known.v), rel=1e-5)


def totals_of(before: float, after: float) -> Totals:
    energies = dict.fromkeys(COMPONENTS, 0.25)
    return Totals(0.0, 1.0, energies, before / 2, after / 2, before, after, 0.3, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "leaves", "words"),
    [
        (0.5, 0.5, "all", "leaves all of the undo"),
        (0.5, 0.48, "all", "leaves all of the undo"),
        (0.5, 0.9, "all", "adds to the largest undo"),
        (0.5, 0.2, "some", "leaves 40% of the largest undo"),
        (0.5, 0.025, "nothing", "takes the undo away"),
        (0.5, -0.1, "nothing", "takes the undo away"),
        (0.009, 0.009, "little", "no module undoes 1 % of its alignment"),
        (-1.4, -1.2, "little", "no module undoes 1 % of its alignment"),
        (0.005, 0.5, "all", "adds to the largest undo"),
    ],
)
def test_a_verdict_says_what_is_left_of_the_undo(before: float, after: float, leaves: str, words: str) -> None:
    verdict = Verdict.of(totals_of(before, after))
    assert (verdict.leaves, words in verdict.text) == (leaves, True)
    assert f"largest {before:+.3f} -> {after:+.3f}, total {before / 2:+.3f} -> {after / 2:+.3f}" in verdict.text


def test_the_table_says_what_is_not_covered_and_shows_kinds_or_modules() -> None:
    covered = {name: factories.SHAPES[name] for name in (DOWN, Q)}
    report = report_of(Policy.csulora(1.0, keep_uncovered=("*",)), covered)
    by_kind, by_module = printed(report_table(report)), printed(report_table(report, every_module=True))
    for text in (by_kind, by_module):
        assert "of |dW|^2 passes uncorrected, in 1 of 3 modules" in text
        assert report.verdict.text in text
        assert "down_proj" in text
    assert UP not in by_kind
    assert any(UP in line and "kept" in line for line in by_module.splitlines())


def test_a_table_without_a_correction_has_no_columns_for_one() -> None:
    assert "change" in printed(report_table(report_of()))
    text = printed(report_table(report_of(Policy.none())))
    assert not {"change", "after", "the policy"} & set(text.split())


def test_modules_stand_in_natural_order_under_short_names() -> None:
    names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (10, 9, 2) for kind in ("v", "q")]
    shapes = dict.fromkeys(names, (40, 40))
    report = correct(factories.adapter(shapes), factories.subspace(shapes), CSULORA)[1]
    lines = [line.split() for line in printed(report_table(report, every_module=True)).splitlines()]
    assert [line[:2] for line in lines if line and line[-1].endswith("%")] == [
        [layer, f"{kind}_proj"] for layer in ("2", "9", "10") for kind in ("q", "v")
    ]


@pytest.mark.parametrize("policy", [Policy.none(), Policy.csulora(1.0, rank=2)])
@pytest.mark.parametrize("every_module", [False, True])
def test_nothing_breaks_at_80_columns(policy: Policy, every_module: bool) -> None:
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    shapes = {f"model.layers.{layer}.mlp.{kind}_proj": (40, 40) for layer in range(32) for kind in kinds}
    report = correct(factories.adapter(shapes), factories.subspace(shapes), policy)[1]
    wide = printed(report_table(report, every_module), 200).splitlines()
    narrow = printed(report_table(report, every_module), 80).splitlines()
    table = [line.rstrip() for line in wide if "_proj" in line]
    assert len(table) == (7 * 32 if every_module else 7)
    assert [line.rstrip() for line in narrow if "_proj" in line] == table


def test_experts_have_a_row_per_projection_that_says_how_many() -> None:
    shapes = dict.fromkeys(html_pages.experts(4, 30), (40, 40)) | {Q: (40, 40)}
    adapter, subspace = factories.adapter(shapes), factories.subspace(shapes)
    report = correct(adapter, subspace, Policy.csulora(1.0))[1]
    counts = {"experts.gate_proj": "120", "experts.up_proj": "120", "experts.down_proj": "120", "q_proj": "1"}
    lines = [line.split() for line in printed(report_table(report), 80).splitlines()]
    assert {line[0]: line[1] for line in lines if line and line[0].endswith("_proj")} == counts
    for table in (tables.adapter_table(adapter), tables.subspace_table(subspace)):
        assert sum("experts" in line for line in printed(table).splitlines()) == 3
    assert printed(tables.adapter_table(adapter, every_module=True)).count("experts") == 360
    assert len(report.to_dict()["modules"]) == 361


def test_a_notebook_shows_the_verdict_and_no_markup_of_a_strangers() -> None:
    report = replace(report_of(Policy.protect()), adapter="<b>bold</b>")
    assert "3 of 3 modules" in repr(report)
    assert report.verdict.text in repr(report)
    assert "&lt;b&gt;bold" in report._repr_html_()
    assert len(repr(report)) < 300


def test_a_frame_has_a_row_per_module_and_a_column_per_figure() -> None:
    pytest.importorskip("pandas")
    frame = report_of(Policy.protect()).to_frame()
    assert list(frame["module"]) == [module.module for module in report_of().modules]
    assert {"undo", "undo_after", "energy_aligned", "gain_off"} <= set(frame.columns)


def test_paths_in_place_of_objects_say_which_function_to_call() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    with pytest.raises(InputError, match=r"adapter is a str; .*csulora.load_adapter\(path\)"):
        correct("adapter", subspace, CSULORA)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"subspace is a PosixPath; .*csulora.Subspace.open\(path\)"):
        correct(adapter, Path("subspace"), CSULORA)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"policy is missing; .*csulora, project, protect, none.*csulora tune"):
        correct(adapter, subspace)


def test_the_card_names_everything_it_was_made_from() -> None:
    report = report_of(Policy.csulora(2.0, keep_uncovered=("*",)), {Q: factories.SHAPES[Q]})
    card = model_card(report, "org/base")
    assert card.startswith('---\nbase_model: "org/base"\nlibrary_name: peft\n')
    assert "# `adapter`, corrected by csulora" in card
    assert "partial=2, off=2, rank=keep" in card
    assert "| modules corrected | 1 of 3 |" in card
    assert report.adapter_sha256 in card
    assert report.subspace_sha256 in card


def test_the_card_survives_strange_names() -> None:
    assert 'base_model: "a\\nlicence: mine"\n' in model_card(report_of(), "a\nlicence: mine")
    assert "base_model" not in model_card(report_of(), None)


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
    for figure in (Q, "other", "NO"):
        assert figure in text
    assert text.count("90.0000%") == 2
