"""Undo of a canary, in the table, the JSON and the page of inspect."""

import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import csulora
import factories
import html_pages
from csulora.correction.canary_undo import CanaryUndo
from csulora.errors import InputError
from csulora.policy.policy import Policy
from csulora.subspace.provenance import Canary
from csulora.subspace.subspace import Subspace
from csulora.views.html.page import assess, render
from csulora.views.report_table import report_table

RECORD = Canary(("0" * 16,), ("1" * 16,), (), 1.0, 1.0, 60, 16, 2e-3, 16, 32, 0)


@pytest.fixture(scope="module")
def subspace() -> Subspace:
    return factories.subspace(factories.SHAPES, seed=1)


@pytest.fixture(scope="module")
def canary() -> Subspace:
    other = factories.subspace(factories.SHAPES, seed=2)
    return Subspace(other, replace(other.provenance, canary=RECORD))


def towards_the_copy(canary: Subspace, factor: float) -> csulora.Adapter:
    """An update that goes some of the way to the copy: -D'' times a factor."""
    modules = {
        name: csulora.LoraModule(-factor * module.u.float() * module.s, module.v.float().T.contiguous())
        for name, module in canary.items()
    }
    return replace(factories.adapter(factories.SHAPES), modules=modules)


def dense_undo(adapter: csulora.Adapter, canary: Subspace) -> float:
    """The definition, with dense matrices."""
    numerator = denominator = 0.0
    for name, module in canary.items():
        d = ((module.u.float() * module.s) @ module.v.float().T).double()
        lora = adapter.modules[name]
        numerator -= float((lora.scale * lora.b.double() @ lora.a.double() * d).sum())
        denominator += float(module.s.double().square().sum())
    return numerator / denominator


def test_the_way_to_the_copy_is_an_undo_of_1(canary: Subspace, subspace: Subspace) -> None:
    for factor in (1.0, 0.25):
        adapter = towards_the_copy(canary, factor)
        found = CanaryUndo.of(adapter, adapter, canary)
        assert found.total() == pytest.approx(factor, rel=1e-3)
        assert found.undo == found.undo_after
        assert all(undo == pytest.approx(factor, rel=1e-2) for undo in found.undo.values())


def test_it_is_measured_before_and_after_the_correction(canary: Subspace, subspace: Subspace) -> None:
    adapter = factories.adapter(factories.SHAPES)
    fixed, _ = csulora.correct(adapter, subspace, Policy.project())
    found = CanaryUndo.of(adapter, fixed, canary)
    assert found.total() == pytest.approx(dense_undo(adapter, canary), abs=1e-5)
    assert found.total_after() == pytest.approx(dense_undo(fixed, canary), abs=1e-4)
    (first, *_) = found.undo
    assert found.total([first, "unknown"]) == pytest.approx(found.undo[first])


def test_a_module_that_the_correction_renames_keeps_its_undo() -> None:
    """Its name of today is another than the adapter's."""
    on_disk, in_memory = (
        f"{prefix}.layers.0.mlp.up_proj" for prefix in ("language_model.model", "model.language_model")
    )
    subspace = factories.subspace({on_disk: (56, 40)}, names={in_memory: on_disk})
    canary = Subspace(subspace, replace(subspace.provenance, canary=RECORD))
    adapter = factories.adapter({on_disk: (56, 40)})
    fixed, _ = csulora.correct(adapter, subspace, Policy.none())
    assert list(fixed.modules) == [in_memory]
    found = CanaryUndo.of(adapter, fixed, canary)
    assert found.undo_after == found.undo == {on_disk: pytest.approx(dense_undo(adapter, canary), abs=1e-5)}


def test_a_module_that_is_left_out_undoes_nothing(canary: Subspace) -> None:
    adapter = towards_the_copy(canary, 1.0)
    first, *others = adapter.modules
    less = replace(adapter, modules={name: adapter.modules[name] for name in others})
    found = CanaryUndo.of(adapter, less, canary)
    assert (found.undo_after[first], found.total([first])) == (0, pytest.approx(1, rel=1e-2))


def test_another_subspace_file_is_no_canary(subspace: Subspace) -> None:
    adapter = factories.adapter(factories.SHAPES)
    with pytest.raises(InputError, match="is no canary; make one with `csulora canary`"):
        CanaryUndo.of(adapter, adapter, subspace)


@pytest.mark.parametrize("policy", [Policy.none(), Policy.protect(10.0)])
def test_table_and_page_have_it_beside_the_undo(canary: Subspace, subspace: Subspace, policy: Policy) -> None:
    assessment = assess(towards_the_copy(canary, 0.5), subspace, policy, canary=canary)
    assert assessment.canary is not None
    is_changed = not assessment.report.changes_nothing
    console = Console(width=80, record=True)
    console.print(report_table(assessment.report, canary=assessment.canary))
    text = console.export_text()
    assert re.search(r"^all .*\+0\.500", text, re.MULTILINE)
    assert ("after the correction (1: as far" in text) is is_changed
    page = render(assessment, subspace, policy)
    after = f" &rarr; {assessment.canary.total_after():+.3f}" if is_changed else ""
    assert f"<dt>Undo of the canary</dt><dd>+0.500{after} <small>how far" in page
    assert ("Undo of the canary after" in page) is is_changed
    assert canary.sha256 in page
    assert "canary" not in html_pages.rendered(towards_the_copy(canary, 0.5), subspace, policy)


def test_its_document_has_every_module(canary: Subspace) -> None:
    adapter = towards_the_copy(canary, 0.5)
    document = CanaryUndo.of(adapter, adapter, canary).to_dict()
    assert document["subspace_sha256"] == canary.sha256
    assert set(document["modules"]) == set(canary)
    assert torch.tensor([document["undo"], document["undo_after"]]).tolist() == pytest.approx([0.5, 0.5], rel=1e-3)
