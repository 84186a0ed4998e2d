"""Annihilation ratios without the aligned checkpoint: estimates from a subspace file's sketches, and their bounds."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import csulora
import factories
from csulora import LoraModule, Policy
from csulora.correction.annihilation import annihilation_ratio, factors_of_error
from csulora.errors import InputError, RefusedError
from csulora.native import _core
from csulora.serving.again import find
from csulora.serving.gate import Gate

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "model.layers.0.self_attn.o_proj"
COLUMNS = 128


def estimate(weight: torch.Tensor, module: LoraModule, seed: int, columns: int = COLUMNS) -> float:
    sketch, a = _core.sketches([weight, module.a], columns, seed)
    factors = _core.LoraFactors(module.b, a, module.scale)
    return _core.annihilations([_core.AnnihilationTask(factors, sketch.half())])[0].ratio


@settings(deadline=None)
@given(
    rank=st.integers(1, 12),
    share=st.floats(0, 2),
    task=st.sampled_from([0.0, 0.02, 0.5, 3.0]),
    seed=st.integers(0, 2**62),
)
def test_the_exact_ratio_lies_in_the_interval_of_the_estimate(rank: int, share: float, task: float, seed: int) -> None:
    weight = factories.gaussian(40, 400, seed=seed % 97)
    u = factories.orthonormal(40, 1, 3).float()
    b = torch.cat([-share * u, task * factories.gaussian(40, rank - 1, seed=5)], 1)
    module = LoraModule(b, torch.cat([u.T @ weight, factories.gaussian(rank - 1, 400, seed=6)]))
    exact, found, ends = annihilation_ratio(weight, module), estimate(weight, module, seed), factors_of_error(rank, 128)
    assert ends is not None
    # Rounding to float16 leaves some millionths of what is removed wholly.
    assert found * ends[0] - 1e-5 <= exact <= found * ends[1] + 1e-5


def test_the_error_shrinks_with_columns_and_is_unbounded_for_large_ranks() -> None:
    ends = [factors_of_error(8, columns) for columns in (128, 512, 2048)]
    lows, highs = zip(*(found for found in ends if found), strict=True)
    assert list(lows) == sorted(lows)
    assert list(highs) == sorted(highs, reverse=True)
    assert [factors_of_error(52, 128) is None, factors_of_error(53, 128) is None] == [False, True]
    assert [factors_of_error(344, 512) is None, factors_of_error(345, 512) is None] == [False, True]
    assert factors_of_error(1, 32) is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    directory = tmp_path_factory.mktemp("place")
    base, aligned = factories.model_pair(directory, layers=1)
    csulora.extract(base, aligned, rank=4, sketch=COLUMNS, seed=7, output=directory / "subspace.safetensors")
    return base, aligned, directory / "subspace.safetensors"


def adapter(aligned: Path, share: float, rank: int = 1) -> csulora.Adapter:
    weight = load_file(aligned / "model.safetensors")[f"{NAME}.weight"].float()
    u = factories.orthonormal(weight.shape[0], 1, 0).float()
    module = LoraModule(-share * u, u.T @ weight).padded(rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["o_proj"]}
    return csulora.Adapter({NAME: module}, config, Path("upload"), "0" * 64)


def test_reports_carry_the_estimate_its_interval_and_the_exact_ratio_where_the_checkpoint_is_given(
    place: tuple[Path, Path, Path],
) -> None:
    _, aligned, path = place
    subspace = csulora.Subspace.open(path)
    found = adapter(aligned, 0.5)
    _, report = csulora.correct(found, subspace, csulora.controls.scaling_policy(0.5))
    totals = report.totals
    assert totals.annihilation_ratio == pytest.approx(0.25, rel=0.01)  # |u^T W G|^2 stands on both sides
    assert totals.annihilation_ratio_after == pytest.approx(0.75**2, rel=0.01)
    assert totals.annihilation_interval is not None
    low, high = totals.annihilation_interval
    assert low < 0.25 < high
    _, exact = csulora.correct(found, subspace, csulora.controls.scaling_policy(0.5), aligned=aligned)
    assert exact.totals.annihilation_interval is None
    assert exact.totals.annihilation_ratio == pytest.approx(0.25, rel=1e-4)


def test_a_gate_refuses_what_annihilates_and_what_the_sketches_cannot_tell(
    place: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, aligned, path = place
    log = tmp_path / "decisions.jsonl"
    gate = Gate.open(path, Policy.none(min_annihilation_ratio=0.05), decisions=log)
    with gate.decision("upload") as decision:
        _, report = decision.correct(adapter(aligned, 0.5))
    assert report.knows_annihilation
    with (
        pytest.raises(RefusedError, match=rf"module {NAME} removes a direction .* about .*asks for 0\.05 or more"),
        gate.decision("upload") as decision,
    ):
        decision.correct(adapter(aligned, 1.0))
    large = adapter(aligned, 1.0, rank=60)
    with (
        pytest.raises(RefusedError, match=f"unknown for module {NAME}: .* too small for rank 60; .* a larger --sketch"),
        gate.decision("upload") as decision,
    ):
        decision.correct(large)
    lines = list(map(json.loads, log.read_text().splitlines()))
    assert [find(log, line["id"])[0] for line in lines] == lines
    totals = [line["totals"] for line in lines]
    assert [found["annihilation_ratio"] for found in totals] == [
        pytest.approx(0.25, rel=0.01),
        pytest.approx(0, abs=1e-5),
        None,
    ]
    assert all(found["undo"] == found["undo_after"] for found in totals)
    _, report = csulora.correct(large, csulora.Subspace.open(path), Policy.none())
    assert (report.annihilation_unknown, report.totals.annihilation_ratio) == ((NAME,), None)


@pytest.mark.parametrize("cancels", [False, True])
def test_what_is_removed_cannot_hide_beside_what_no_input_has(place: tuple[Path, Path, Path], cancels: bool) -> None:
    """A component that is large, and harmless where an input is always 0; or two that cancel each other."""
    _, aligned, path = place
    found = adapter(aligned, 1.0)
    module = found.modules[NAME]
    unread = torch.zeros(1, module.shape[1])
    unread[0, 0] = 1e8
    any_other = factories.gaussian(module.shape[0], 1, seed=3)
    other = -module.b if cancels else any_other - module.b @ (module.b.T @ any_other)
    a = torch.cat([module.a + unread if cancels else module.a, unread])
    hiding = replace(found, modules={NAME: LoraModule(torch.cat([module.b, other], 1), a)})
    policy = Policy.none(min_annihilation_ratio=0.1)
    for checkpoint in (None, aligned):
        with pytest.raises(RefusedError, match=f"module {NAME} removes a direction"):
            csulora.correct(hiding, csulora.Subspace.open(path), policy, aligned=checkpoint)


def test_sketches_survive_the_file_and_are_verified(place: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, path = place
    subspace = csulora.Subspace.open(path)
    assert subspace.sketch_columns == COLUMNS
    assert all(module.sketch is not None and module.sketch.dtype == torch.float16 for module in subspace.values())
    csulora.extract(base, aligned, rank=4, sketch=COLUMNS, seed=7, output=tmp_path / "again.safetensors")
    again = csulora.extract(base, aligned, rank=4, sketch=COLUMNS, seed=7)  # with as many threads, unlike the fixture
    assert again.sha256 == csulora.Subspace.open(tmp_path / "again.safetensors").sha256
    assert all(result.holds for result in csulora.verify(subspace, base, aligned))
    module = subspace[NAME]
    assert module.sketch is not None
    forged = csulora.Subspace(dict(subspace) | {NAME: replace(module, sketch=-module.sketch)}, subspace.provenance)
    assert [result.module for result in csulora.verify(forged, base, aligned) if not result.holds] == [NAME]
    without_seed = replace(subspace.provenance, options={})
    csulora.Subspace(dict(subspace), without_seed).save(tmp_path / "damaged.safetensors")
    with pytest.raises(InputError, match="no seed; the file is damaged"):
        csulora.Subspace.open(tmp_path / "damaged.safetensors")


def test_a_damaged_sketch_is_the_subspace_files_fault_and_known_before_any_adapter(
    place: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    subspace = csulora.Subspace.open(place[2])
    module = subspace[NAME]
    assert module.sketch is not None
    sketch = torch.full_like(module.sketch, math.nan)
    path = tmp_path / "damaged.safetensors"
    csulora.Subspace(dict(subspace) | {NAME: replace(module, sketch=sketch)}, subspace.provenance).save(path)
    with pytest.raises(InputError, match=rf"damaged\.safetensors: {NAME}: the sketch holds NaN or infinity"):
        Gate.open(path, Policy.none())


def test_sketches_that_cannot_be_made_are_refused(place: tuple[Path, Path, Path]) -> None:
    base, aligned, _ = place
    with pytest.raises(InputError, match="sketch is -1; it must lie between 0 and 4096"):
        csulora.extract(base, aligned, sketch=-1)
    module = csulora.extract(base, aligned, rank=4, modules=[NAME])[NAME]
    assert module.sketch is None
    with pytest.raises(InputError, match="and the sketch"):
        replace(module, sketch=torch.zeros(3, 4).half())
    assert math.isfinite(module.norm)
