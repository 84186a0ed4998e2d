"""Controls against dense float64 twins."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import csulora
import factories
from csulora import Policy, controls
from csulora.adapters.lora import REPORT_FILE
from csulora.correction.controls.safe_lora import Projection
from csulora.errors import InputError, RefusedError
from tolerances import COMPUTED

TOLERANCE = COMPUTED[torch.float32]
LAYERS = {f"model.layers.{layer}.self_attn.q_proj": (40, 40) for layer in (0, 2, 10)}


@pytest.fixture
def adapter() -> csulora.Adapter:
    return factories.adapter(LAYERS)


@pytest.fixture
def subspace() -> csulora.Subspace:
    return factories.subspace(LAYERS)


def dense(module: csulora.LoraModule) -> Tensor:
    return module.scale * module.b.double() @ module.a.double()


def projector(module: csulora.subspace.module_subspace.ModuleSubspace, projection: Projection) -> Tensor:
    u, s = module.u.double(), module.s.double()
    if projection == "exact":
        displacement = u * s
        return displacement @ torch.linalg.pinv(displacement.T @ displacement) @ displacement.T
    return (u * s) @ (u * s).T / math.sqrt(module.certificate.displacement_norm2)


def close(found: Tensor, wanted: Tensor, scale: Tensor) -> bool:
    return float((found - wanted).norm()) <= 10 * TOLERANCE * float(scale.norm())


@pytest.mark.parametrize("projection", ["exact", "fast"])
def test_safe_lora_is_its_formula(adapter: csulora.Adapter, subspace: csulora.Subspace, projection: Projection) -> None:
    projected, report = controls.safe_lora(adapter, subspace, math.inf, projection)
    for name, module in adapter.modules.items():
        wanted = projector(subspace[name], projection) @ dense(module)
        assert close(dense(projected.modules[name]), wanted, wanted)
        found = controls.cosines(adapter, subspace, projection)[name]
        cosine = float((wanted * dense(module)).sum() / (wanted.norm() * dense(module).norm()))
        assert found == pytest.approx(cosine, rel=1e-3)
    assert report.policy == {"control": "safe lora", "threshold": math.inf, "projection": projection}


def test_safe_lora_projects_the_least_similar_modules(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    similar = controls.cosines(adapter, subspace)
    threshold = sorted(similar.values())[1]
    projected, report = controls.safe_lora(adapter, subspace, threshold)
    for name, module in adapter.modules.items():
        is_kept = projected.modules[name] is module
        assert is_kept is (similar[name] >= threshold)
    assert [module.relative_change == 0 for module in report.measured].count(True) == 2
    assert controls.safe_lora(adapter, subspace, 0.0)[0].modules == adapter.modules


def test_safe_lora_without_the_alignment_is_refused(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    with pytest.raises(InputError, match="threshold is NaN"):
        controls.safe_lora(adapter, subspace, math.nan)
    with pytest.raises(InputError, match="must be exact or fast"):
        controls.cosines(adapter, subspace, "quick")  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="covers other layers, but not module"):
        controls.cosines(adapter, factories.subspace())


def test_an_update_of_nothing_has_no_cosine(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    modules = {name: replace(module, b=torch.zeros_like(module.b)) for name, module in adapter.modules.items()}
    assert set(controls.cosines(replace(adapter, modules=modules), subspace).values()) == {0.0}


def test_scaling_multiplies_the_whole_update(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    scaled, report = controls.scaling(adapter, subspace, 0.25)
    for name, module in adapter.modules.items():
        assert close(dense(scaled.modules[name]), 0.25 * dense(module), dense(module))
    assert report.totals.relative_change == pytest.approx(0.75, rel=1e-4)
    assert report.totals.undo_after == pytest.approx(0.25 * report.totals.undo, rel=1e-3)


def test_the_report_is_measured_in_the_subspace_of_the_alignment(
    adapter: csulora.Adapter, subspace: csulora.Subspace
) -> None:
    changed, report = controls.random_subspace(adapter, subspace, Policy.project(), seed=3)
    policy = Policy.project()
    _, wanted = csulora.correct(adapter, controls.random_subspaces(subspace, 3), policy)
    _, before = csulora.correct(adapter, subspace, Policy.none())
    assert report.subspace_sha256 == subspace.sha256
    for module in report.measured:
        u, s, v = (
            factor.double()
            for factor in (subspace[module.module].u, subspace[module.module].s, subspace[module.module].v)
        )
        displacement, left = (u * s) @ v.T, dense(changed.modules[module.module])
        undo = -float((left * displacement).sum() / s.square().sum())
        assert module.undo_after == pytest.approx(undo, abs=1e-4)
        update = dense(adapter.modules[module.module])
        assert module.relative_change == pytest.approx(float((left - update).norm() / update.norm()), rel=1e-4)
    assert report.totals.undo == before.totals.undo
    assert report.totals.relative_change == pytest.approx(wanted.totals.relative_change, rel=1e-3)


def test_a_policys_own_report_is_what_comparing_finds(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    fixed, wanted = csulora.correct(adapter, subspace, Policy.protect(2.0, rank="exact"))
    _, found = controls.compared(adapter, fixed, subspace, {})
    for one, other in zip(found.measured, wanted.measured, strict=True):
        assert (one.undo, one.energies) == (other.undo, other.energies)
        assert one.undo_after == pytest.approx(other.undo_after, abs=1e-4)
        assert one.relative_change == pytest.approx(other.relative_change, rel=1e-3)
        assert one.gains == pytest.approx(other.gains, rel=1e-2)


def test_other_layers_have_the_next_layers_directions(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    moved = controls.other_layers(subspace)
    first, third, eleventh = LAYERS  # in the order of layers, not of letters
    assert torch.equal(moved[first].u, subspace[third].u)
    assert torch.equal(moved[third].u, subspace[eleventh].u)
    assert torch.equal(moved[eleventh].u, subspace[first].u)
    _, report = controls.other_layer(adapter, subspace, Policy.project())
    _, wanted = csulora.correct(adapter, moved, Policy.project())
    assert report.totals.relative_change == pytest.approx(wanted.totals.relative_change, rel=1e-3)
    mixed = factories.subspace({"model.layers.0.up_proj": (40, 56), "model.layers.1.up_proj": (56, 40)})
    with pytest.raises(InputError, match="up_proj modules differ in shape"):
        controls.other_layers(mixed)


def test_an_adapters_own_directions_hold_all_of_its_update(
    adapter: csulora.Adapter, subspace: csulora.Subspace
) -> None:
    rank = max(module.rank for module in adapter.modules.values())
    wide = factories.subspace(LAYERS, rank=rank)
    removed, _ = controls.own_subspace(adapter, wide, Policy.protect(math.inf))
    for name, module in removed.modules.items():
        assert float(dense(module).norm()) <= 1e-3 * float(dense(adapter.modules[name]).norm())


def test_truncated_subspaces_keep_the_leading_directions(subspace: csulora.Subspace) -> None:
    for name, module in controls.truncated(subspace, 2).items():
        assert module.rank == 2
        assert torch.equal(module.u, subspace[name].u[:, :2])
        assert torch.equal(module.s, subspace[name].s[:2])


def test_a_control_can_be_written(adapter: csulora.Adapter, subspace: csulora.Subspace, tmp_path: Path) -> None:
    projected, report = controls.safe_lora(adapter, subspace, math.inf)
    csulora.save_adapter(projected, tmp_path / "control")
    read = csulora.load_adapter(tmp_path / "control")
    for name, module in projected.modules.items():
        assert torch.equal(dense(read.modules[name]), dense(module))
    written = json.loads((tmp_path / "control" / REPORT_FILE).read_text())
    assert written["policy"] == {"control": "safe lora", "threshold": "inf", "projection": "exact"}
    assert written["totals"]["relative_change"] == report.totals.relative_change
    assert not (tmp_path / "control" / "README.md").exists()  # it is no corrected adapter


def test_adapters_with_other_modules_are_not_compared(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    fewer = replace(adapter, modules=dict(list(adapter.modules.items())[:1]))
    with pytest.raises(InputError, match="has other modules"):
        controls.compared(adapter, fewer, subspace, {})
