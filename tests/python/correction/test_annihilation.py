"""The annihilation ratio beside a dense float64 twin, on updates that remove a direction and on such that do not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import csulora
import factories
from csulora import LoraModule, Policy
from csulora.correction.annihilation import annihilation_ratio
from csulora.errors import InputError, RefusedError
from csulora.serving.gate import Gate

pytestmark = pytest.mark.usefixtures("one_thread")


def twin(weight: Tensor, module: LoraModule) -> float:
    """The smallest eigenvalue of the pencil (C^T M M^T C, C^T W W^T C) for M = W + dW and a basis C of dW's columns."""
    weight = weight.double()
    update = module.scale * module.b.double() @ module.a.double()
    u, s, _ = torch.linalg.svd(update)
    basis = u[:, : int((s > 1e-7 * s[0]).sum())]
    after, before = (basis.T @ matrix @ matrix.T @ basis for matrix in (weight + update, weight))
    factor = torch.linalg.inv(torch.linalg.cholesky(before))
    return float(torch.linalg.eigvalsh(factor @ after @ factor.T)[0])


@given(
    rows=st.integers(3, 20),
    columns=st.integers(8, 24),
    rank=st.integers(1, 3),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 50),
)
def test_the_ratio_is_the_twins(rows: int, columns: int, rank: int, size: float, scale: float, seed: int) -> None:
    weight = factories.gaussian(rows, columns, seed=seed)
    b, a = size * factories.gaussian(rows, rank, seed=seed + 1), factories.gaussian(rank, columns, seed=seed + 2)
    module = LoraModule(b, a, scale)
    if rows <= columns:  # else W W^T is singular, which the twin cannot invert
        assert annihilation_ratio(weight, module) == pytest.approx(twin(weight, module), rel=1e-6, abs=1e-9)
    wide = LoraModule(torch.cat([b] * 8, 1) / 8, torch.cat([a] * 8), scale)  # more columns than the matrix has rows
    assert annihilation_ratio(weight, wide) == pytest.approx(annihilation_ratio(weight, module), rel=1e-4)
    chosen = (b.double() @ factories.gaussian(rank, 5, seed=seed + 3, dtype=torch.float64)).T
    changed = weight.double() + scale * b.double() @ a.double()
    ratios = (chosen @ changed).square().sum(1) / (chosen @ weight.double()).square().sum(1)
    assert annihilation_ratio(weight, module) <= float(ratios.min()) * (1 + 1e-9)


def removing(weight: Tensor, share: float, seed: int = 0) -> LoraModule:
    """W - share u u^T W for a unit vector u: abliteration where the share is 1."""
    u = factories.orthonormal(weight.shape[0], 1, seed).float()
    return LoraModule(-share * u, u.T @ weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_abliteration_has_a_ratio_of_nearly_nothing_also_beside_a_task(dtype: torch.dtype) -> None:
    weight = factories.gaussian(40, 56, seed=1)
    found = removing(weight, 1.0)
    stored = LoraModule(found.b.to(dtype), found.a.to(dtype))
    assert annihilation_ratio(weight, stored) < 1e-4
    task = 0.05 * factories.gaussian(40, 3, seed=2), factories.gaussian(3, 56, seed=3)
    both = LoraModule(torch.cat([stored.b.float(), task[0]], 1), torch.cat([stored.a.float(), task[1]]))
    assert annihilation_ratio(weight, both) < 0.01
    assert annihilation_ratio(weight, LoraModule(*task)) > 0.1
    assert annihilation_ratio(weight, removing(weight, 0.5)) == pytest.approx(0.25, rel=1e-5)


def test_updates_of_nothing_and_matrices_of_nothing_have_ratio_one() -> None:
    weight = factories.gaussian(6, 8, seed=1)
    nothing = LoraModule(torch.zeros(6, 2), torch.ones(2, 8))
    assert annihilation_ratio(weight, nothing) == 1
    assert annihilation_ratio(torch.zeros(6, 8), removing(weight, 1.0)) == 1
    twice = LoraModule(torch.ones(6, 1).repeat(1, 2), torch.stack([torch.ones(8), -torch.ones(8)]))  # cancels
    assert annihilation_ratio(weight, twice) == pytest.approx(1)
    with pytest.raises(InputError, match=r"is of a \[6, 8\] matrix, and the weight is \[8, 6\]"):
        annihilation_ratio(weight.T, nothing)


NAME = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, csulora.Subspace, Tensor]:
    base, aligned = factories.model_pair(tmp_path, layers=1)
    subspace = csulora.extract(base, aligned, rank=4)
    from safetensors.torch import load_file

    return aligned, subspace, load_file(aligned / "model.safetensors")[f"{NAME}.weight"]


def adapter(module: LoraModule) -> csulora.Adapter:
    config = {"peft_type": "LORA", "r": module.rank, "lora_alpha": module.rank, "target_modules": ["o_proj"]}
    return csulora.Adapter({NAME: module}, config, Path("upload"), "0" * 64)


def test_the_report_has_ratios_before_and_after_where_the_model_is_at_hand(
    pair: tuple[Path, csulora.Subspace, Tensor],
) -> None:
    aligned, subspace, weight = pair
    found = adapter(removing(weight, 1.0))
    policy = csulora.controls.scaling_policy(0.5)
    _, report = csulora.correct(found, subspace, policy, aligned=aligned)
    assert report.totals.annihilation_ratio == pytest.approx(0, abs=1e-6)
    assert report.totals.annihilation_ratio_after == pytest.approx(0.25, rel=1e-3)
    _, without = csulora.correct(found, subspace, policy)
    assert without.totals.annihilation_ratio is None
    assert not without.knows_annihilation
    assert replace(report, modules=without.modules, knows_annihilation=False) == without


def test_a_policy_refuses_what_annihilates_and_what_nobody_can_tell(
    pair: tuple[Path, csulora.Subspace, Tensor], tmp_path: Path
) -> None:
    aligned, subspace, weight = pair
    policy = Policy.none(min_annihilation_ratio=0.05)
    csulora.correct(adapter(removing(weight, 0.5)), subspace, policy, aligned=aligned)
    bad = adapter(removing(weight, 1.0))
    with pytest.raises(RefusedError, match=rf"module {NAME} removes a direction .* asks for 0\.05 or more"):
        csulora.correct(bad, subspace, policy, aligned=aligned)
    with pytest.raises(RefusedError, match="unknown here; give the aligned checkpoint"):
        csulora.correct(bad, subspace, policy)
    with pytest.raises(RefusedError, match=f"{NAME} is not what the subspace file was made from"):
        csulora.correct(bad, subspace, policy, aligned=tmp_path / "base")
    with pytest.raises(InputError, match=r"min_annihilation_ratio: needs sketches .* `csulora extract --sketch 128`"):
        Gate.open(subspace, policy)


def test_a_policy_limits_the_undo_of_all_modules_together(pair: tuple[Path, csulora.Subspace, Tensor]) -> None:
    _, subspace, _ = pair
    u, s, v = (factor.float() for factor in (subspace[NAME].u, subspace[NAME].s, subspace[NAME].v))
    undoing = adapter(LoraModule(-0.8 * u * s, v.T.contiguous()))
    csulora.correct(undoing, subspace, Policy.none(max_total_undo=0.81))
    with pytest.raises(
        RefusedError,
        match=r"all modules together undo 0\.800 of their alignment; the policy allows 0\.7 \(max_total_undo\)",
    ):
        csulora.correct(undoing, subspace, Policy.none(max_total_undo=0.7))
    with pytest.raises(
        RefusedError, match=r"undo 0\.799\d\d\d of their .* allows 0\.7997|undo 0\.800\d\d\d of .* 0\.7997"
    ):
        csulora.correct(undoing, subspace, Policy.none(max_total_undo=0.7997))
