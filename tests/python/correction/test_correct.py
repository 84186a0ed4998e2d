import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import csulora
import factories
import oracle
from csulora import Policy, Subspace, correct
from csulora.adapters.lora import Adapter, LoraModule
from csulora.errors import InputError, RefusedError
from csulora.policy.overrides import Directions, Override
from tolerances import COMPUTED, STORED

pytestmark = pytest.mark.usefixtures("one_thread")

DOWN, UP, Q = sorted(factories.SHAPES)
EXACT = {"rank": "exact"}


def dense(module: LoraModule) -> Tensor:
    return oracle.update(module.b, module.a, module.scale)


def assert_close(module: LoraModule, expected: Tensor, tolerance: float = COMPUTED[torch.float32]) -> None:
    assert module.scale == 1
    assert oracle.relative_error(dense(module), expected) <= tolerance


@pytest.mark.parametrize(
    ("policy", "penalties"),
    [
        (Policy.csulora(2.0, **EXACT), (0, 2, 2)),
        (Policy.protect(3.0, **EXACT), (3, 3, 0)),
        (Policy.project(**EXACT), (0, math.inf, math.inf)),
        (Policy.none(**EXACT), (0, 0, 0)),
        (Policy(0.5, 1.5, math.inf, **EXACT), (0.5, 1.5, math.inf)),
    ],
)
def test_every_module_becomes_its_closest_safe_update(policy: Policy, penalties: tuple[float, float, float]) -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    fixed, report = correct(adapter, subspace, policy)
    assert list(fixed.modules) == [module.module for module in report.modules] == list(adapter.modules)
    for name, module in adapter.modules.items():
        expected = oracle.closest_safe_update(dense(module), subspace[name].u, subspace[name].v, penalties)
        assert_close(fixed.modules[name], expected)


def test_csulora_keeps_what_is_aligned_at_the_adapters_rank() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    fixed, report = correct(adapter, subspace, Policy.csulora())
    assert report.policy == Policy.csulora(1.0).to_dict()
    for name, module in adapter.modules.items():
        whole = oracle.closest_safe_update(dense(module), subspace[name].u, subspace[name].v, (0, 1, 1))
        u, s, vh = torch.linalg.svd(whole)
        assert fixed.modules[name].rank == module.rank
        assert_close(fixed.modules[name], (u[:, :4] * s[:4]) @ vh[:4])


@pytest.mark.parametrize(("rank", "expected"), [("keep", 4), ("exact", 8), (3, 3), (6, 6), (100, 8)])
def test_the_rank_is_what_the_policy_says(rank: int | str, expected: int) -> None:
    fixed, report = correct(factories.adapter(), factories.subspace(), Policy.csulora(1.0, rank=rank))
    assert {module.rank for module in fixed.modules.values()} == {expected}
    assert {module.rank_after for module in report.modules} == {expected}


def along(update: Tensor, u: Tensor, v: Tensor, directions: Directions) -> Tensor:
    """Dense float64 twin of gains per direction, without what is reinforced."""
    for basis, gains, transposed in ((u, directions.left, False), (v, directions.right, True)):
        basis = basis[:, : len(gains)].double()
        removed = basis @ torch.diag(1 - torch.tensor(gains, dtype=torch.float64)) @ basis.T
        update = update - (update @ removed if transposed else removed @ update)
    return update


@pytest.mark.parametrize("rank", ["keep", 2])
def test_every_direction_has_a_gain_of_its_own(rank: int | str) -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    directions = Directions((0.0, 0.25), (1.0, 0.5, 0.75))
    override = Override("q_proj", directions=directions)
    fixed, report = correct(adapter, subspace, Policy.none(rank=rank, overrides=(override,)))
    wanted = along(dense(adapter.modules[Q]), subspace[Q].u, subspace[Q].v, directions)
    u, s, vh = torch.linalg.svd(wanted)
    cut = len(s) if rank == "keep" else int(rank)
    assert_close(fixed.modules[Q], (u[:, :cut] * s[:cut]) @ vh[:cut])
    measured = {module.module: module for module in report.modules}[Q]
    components, kept = (
        oracle.split(update, subspace[Q].u, subspace[Q].v).components for update in (dense(adapter.modules[Q]), wanted)
    )
    norm = float(dense(adapter.modules[Q]).norm())
    assert measured.norm == pytest.approx(norm, rel=COMPUTED[torch.float32])
    assert measured.relative_change == pytest.approx(
        float((wanted - dense(adapter.modules[Q])).norm()) / norm, rel=1e-5
    )
    assert measured.kept_share == pytest.approx(float(wanted.norm()) ** 2 / norm**2, rel=1e-5)
    assert measured.gains == pytest.approx(
        {c: float(kept[c].norm() / component.norm()) for c, component in components.items()}, rel=1e-5
    )
    assert measured.truncation_error == pytest.approx(float(s[cut:].square().sum() / s.square().sum()), abs=1e-6)
    for name in (UP, DOWN):
        assert_close(
            fixed.modules[name], dense(adapter.modules[name]) if rank == "keep" else dense(fixed.modules[name])
        )


@pytest.mark.parametrize("rank", ["keep", "exact", 2])
def test_what_alignment_did_is_reinforced(rank: int | str) -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    directions = Directions((0.5,), (), reinforced=(0.0, 0.75, -0.25))
    override = Override("*", directions=directions)
    fixed, report = correct(adapter, subspace, Policy.none(rank=rank, overrides=(override,)))
    measured = {module.module: module for module in report.modules}
    for name, module in adapter.modules.items():
        update, (u, v) = dense(module), (subspace[name].u, subspace[name].v)
        added = sum(
            x * subspace[name].s[i].double() * torch.outer(u[:, i].double(), v[:, i].double())
            for i, x in enumerate(directions.reinforced)
        )
        wanted = along(update, u, v, directions) + added
        left, s, right = torch.linalg.svd(wanted)
        cut = len(s) if isinstance(rank, str) else rank
        assert_close(fixed.modules[name], (left[:, :cut] * s[:cut]) @ right[:cut])
        assert measured[name].rank_after == (module.rank + 2 if isinstance(rank, str) else rank)
        assert measured[name].relative_change == pytest.approx(
            float((wanted - update).norm() / update.norm()), rel=1e-5
        )
        assert measured[name].kept_share == pytest.approx(float(wanted.norm() / update.norm()) ** 2, rel=1e-5)
        undo = (
            -float((update * ((u.double() * subspace[name].s.double()) @ v.double().T)).sum())
            / subspace[name].norm ** 2
        )
        assert measured[name].undo == pytest.approx(undo, rel=1e-5)


def energy_along(adapter: Adapter, subspace: Subspace, left: int, right: int) -> float:
    """Float64 twin of an adapter's relative energy along the first directions."""
    along = whole = 0.0
    for name, module in adapter.modules.items():
        update = dense(module)
        written = subspace[name].u[:, :left].double().T @ update
        read = update @ subspace[name].v[:, :right].double()
        along += float(written.square().sum() + read.square().sum()) / 2
        whole += float(update.square().sum())
    return along / whole


@pytest.mark.parametrize("reference_energy", [1e-6, 0.02, 0.3, 1.0])
def test_gains_of_directions_follow_the_adapters_energy_along_them(reference_energy: float) -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    directions = Directions((0.0, 0.25), (1.0, 0.5, 0.75), (0.5,))
    policy = Policy.none(
        rank="exact", overrides=(Override("*", directions=directions),), reference_energy=reference_energy
    )
    penalty_scale = max(0.4, (energy_along(adapter, subspace, 2, 3) / reference_energy) ** 2)
    follow = [[g / (g + (1 - g) * penalty_scale) for g in side] for side in (directions.left, directions.right)]
    followed = Directions(tuple(follow[0]), tuple(follow[1]), directions.reinforced)
    fixed, _ = correct(adapter, subspace, policy)
    wanted, _ = correct(adapter, subspace, Policy.none(rank="exact", overrides=(Override("*", directions=followed),)))
    for name in adapter.modules:
        assert_close(fixed.modules[name], dense(wanted.modules[name]))


def test_an_adapter_of_the_reference_energy_gets_the_gains_as_they_are() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    overrides = (Override("*", directions=Directions((0.25,), (0.5,))),)
    usual = energy_along(adapter, subspace, 1, 1)
    fixed, _ = correct(adapter, subspace, Policy.none(overrides=overrides, reference_energy=usual))
    wanted, _ = correct(adapter, subspace, Policy.none(overrides=overrides))
    for name in adapter.modules:
        assert_close(fixed.modules[name], dense(wanted.modules[name]))


def test_directions_keep_storage_types_and_refuse_what_these_cannot_hold() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    half = {name: replace(module, b=module.b.half(), a=module.a.half()) for name, module in adapter.modules.items()}
    policy = Policy.none(overrides=(Override("*", directions=Directions((0.5,), (0.5,))),))
    fixed, _ = correct(replace(adapter, modules=half), subspace, policy)
    for name, module in fixed.modules.items():
        assert module.b.dtype == module.a.dtype == torch.float16
        wanted = along(dense(half[name]), subspace[name].u, subspace[name].v, Directions((0.5,), (0.5,)))
        assert_close(module, wanted, STORED[torch.float16])
    large = {name: replace(module, scale=1e12) for name, module in half.items()}
    with pytest.raises(InputError, match="too large for"):
        correct(replace(adapter, modules=large), subspace, policy)


def test_an_update_of_nothing_keeps_nothing_along_its_directions() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    nothing = replace(adapter.modules[Q], b=torch.zeros_like(adapter.modules[Q].b))
    policy = Policy.none(overrides=(Override("*", directions=Directions((0.5,), (0.5,), (0.5,))),))
    for each in (policy, replace(policy, reference_energy=0.5)):
        fixed, report = correct(replace(adapter, modules={Q: nothing}), subspace, each)
        assert not dense(fixed.modules[Q]).any()
        assert (report.totals.relative_change, report.totals.truncation_error) == (0, 0)


def test_an_update_that_vanishes_beside_what_is_reinforced_is_refused() -> None:
    policy = Policy.none(overrides=(Override("*", directions=Directions((0.5,), (0.5,), (0.5,))),))
    with pytest.raises(InputError, match="too small to be measured"):
        correct(factories.adapter(scale=1e-157), factories.subspace(), policy)


def test_gains_for_more_directions_than_the_subspace_has_are_refused() -> None:
    policy = Policy.none(overrides=(Override("*", directions=Directions((), (1.0,) * 99)),))
    with pytest.raises(InputError, match="numbers for 99 right directions, and the subspace file has"):
        correct(factories.adapter(), factories.subspace(), policy)


def test_overrides_replace_the_policys_numbers_for_the_modules_they_match() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    gains = {"aligned": 0.25, "left": 0.5, "right": 0.75, "off": 1.0}
    policy = Policy.csulora(
        2.0,
        rank="exact",
        overrides=(Override("q_proj", gains=tuple(gains.values())), Override("mlp.up_proj", penalties=(5, 0, 0))),
    )
    fixed, report = correct(adapter, subspace, policy)
    components = {
        name: oracle.split(dense(module), subspace[name].u, subspace[name].v)
        for name, module in adapter.modules.items()
    }
    assert_close(fixed.modules[Q], oracle.combine(components[Q], gains))
    assert_close(fixed.modules[UP], oracle.combine(components[UP], oracle.gains((5, 0, 0), components[UP].energies)))
    assert_close(
        fixed.modules[DOWN], oracle.combine(components[DOWN], oracle.gains((0, 2, 2), components[DOWN].energies))
    )
    assert {module.module: module.gains for module in report.modules}[Q] == gains


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_has_the_inputs_storage_type(dtype: torch.dtype) -> None:
    adapter, subspace = factories.adapter(dtype=dtype), factories.subspace()
    fixed, _ = correct(adapter, subspace, Policy.csulora(1.0, rank="exact"))
    for name, module in fixed.modules.items():
        assert module.b.dtype == module.a.dtype == dtype
        expected = oracle.closest_safe_update(
            dense(adapter.modules[name]), subspace[name].u, subspace[name].v, (0, 1, 1)
        )
        assert_close(module, expected, max(COMPUTED[torch.float32], 2 * STORED[dtype]))


def test_the_input_is_not_modified() -> None:
    adapter = factories.adapter()
    before = {name: (module.b.clone(), module.a.clone()) for name, module in adapter.modules.items()}
    correct(adapter, factories.subspace(), Policy.project())
    for name, (b, a) in before.items():
        assert torch.equal(adapter.modules[name].b, b)
        assert torch.equal(adapter.modules[name].a, a)
        assert adapter.modules[name].scale == 2


@pytest.mark.usefixtures("restore_threads")
def test_the_same_input_gives_the_same_bits_whatever_the_number_of_threads() -> None:
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        results.append(correct(factories.adapter(), factories.subspace(), Policy.csulora(1.0)))
    (first, report), *others = results
    for fixed, other_report in others:
        assert fixed.documents == first.documents
        assert other_report == report
        for name, module in fixed.modules.items():
            assert torch.equal(module.b, first.modules[name].b)
            assert torch.equal(module.a, first.modules[name].a)


def renamed(adapter: Adapter, names: dict[str, str]) -> Adapter:
    return replace(adapter, modules={names.get(name, name): module for name, module in adapter.modules.items()})


def test_modules_are_found_by_name_up_to_the_bare_models_prefix() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    expected, _ = correct(adapter, subspace, Policy.csulora())
    short = renamed(adapter, {name: name.removeprefix("model.") for name in factories.SHAPES})
    fixed, _ = correct(short, subspace, Policy.csulora())
    for name, module in expected.modules.items():
        assert torch.equal(fixed.modules[name.removeprefix("model.")].b, module.b)


def test_the_head_of_a_tied_model_is_corrected_by_the_embeddings_subspace() -> None:
    subspace = factories.subspace({"model.embed_tokens": (50, 16)}, aliases={"lm_head": "model.embed_tokens"})
    adapter = factories.adapter({"lm_head": (50, 16)})
    fixed, _ = correct(adapter, subspace, Policy.project())
    found = subspace["model.embed_tokens"]
    expected = oracle.split(dense(adapter.modules["lm_head"]), found.u, found.v).components["aligned"]
    assert_close(fixed.modules["lm_head"], expected)


def test_both_names_of_a_tied_weight_count_towards_what_is_undone() -> None:
    subspace = factories.subspace({"model.embed_tokens": (50, 16)}, aliases={"lm_head": "model.embed_tokens"})
    found = subspace["model.embed_tokens"]
    half = LoraModule(-0.5 * found.u.float() * found.s, found.v.float().t().contiguous())
    adapter = replace(factories.adapter(), modules={"lm_head": half, "model.embed_tokens": half})
    with pytest.raises(RefusedError, match=r"lm_head and model.embed_tokens undoes 1\.0.* allows 0\.6"):
        correct(adapter, subspace, Policy.none(max_undo=0.6))
    correct(replace(adapter, modules={"lm_head": half}), subspace, Policy.none(max_undo=0.6))


def test_an_embedding_stays_one() -> None:
    adapter = factories.adapter({"model.embed_tokens": (50, 16)})
    marked = replace(adapter.modules["model.embed_tokens"], is_embedding=True)
    fixed, _ = correct(
        replace(adapter, modules={"model.embed_tokens": marked}),
        factories.subspace({"model.embed_tokens": (50, 16)}),
        Policy.csulora(),
    )
    assert fixed.modules["model.embed_tokens"].is_embedding


@pytest.fixture
def partly_covered() -> tuple[Adapter, Subspace]:
    """An adapter for three modules, of which the subspace file has two."""
    return factories.adapter(), factories.subspace({name: factories.SHAPES[name] for name in (DOWN, Q)})


def test_an_uncovered_module_is_refused_by_name(partly_covered: tuple[Adapter, Subspace]) -> None:
    with pytest.raises(
        RefusedError, match=rf"some/adapter: the subspace file does not cover module {UP}; .*--drop-uncovered"
    ):
        correct(*partly_covered, Policy.csulora())


def test_an_uncovered_module_is_dropped_if_the_policy_says_so(partly_covered: tuple[Adapter, Subspace]) -> None:
    fixed, report = correct(*partly_covered, Policy.csulora(1.0, drop_uncovered=("*",)))
    assert list(fixed.modules) == [DOWN, Q]
    assert fixed.partial
    assert [(module.module, module.status) for module in report.modules] == [
        (DOWN, "corrected"),
        (UP, "dropped"),
        (Q, "corrected"),
    ]


def test_what_no_glob_names_is_refused_beside_what_one_does(partly_covered: tuple[Adapter, Subspace]) -> None:
    for globs in ({"keep_uncovered": ("q_proj",)}, {"drop_uncovered": ("elsewhere.*",)}):
        with pytest.raises(RefusedError, match=f"does not cover module {UP}; .*--drop-uncovered or --keep-uncovered"):
            correct(*partly_covered, Policy.csulora(1.0, **globs))


def test_what_is_to_be_kept_and_dropped_is_dropped(partly_covered: tuple[Adapter, Subspace]) -> None:
    both = Policy.csulora(1.0, keep_uncovered=("*",), drop_uncovered=("up_proj",))
    fixed, _ = correct(*partly_covered, both)
    assert UP not in fixed.modules


def test_an_uncovered_module_is_kept_as_it_is_if_the_policy_says_so(partly_covered: tuple[Adapter, Subspace]) -> None:
    adapter, subspace = partly_covered
    fixed, report = correct(adapter, subspace, Policy.csulora(1.0, keep_uncovered=("*",)))
    assert list(fixed.modules) == [DOWN, UP, Q]
    assert fixed.modules[UP] is adapter.modules[UP]
    assert not fixed.partial
    assert [module.status for module in report.modules] == ["corrected", "kept", "corrected"]


FATES: list[dict[str, tuple[str, ...]]] = [{}, {"drop_uncovered": ("*",)}, {"keep_uncovered": ("*",)}]


@pytest.mark.parametrize("fate", FATES)
def test_an_adapter_that_matches_nothing_is_refused_whatever_the_policy(fate: dict[str, tuple[str, ...]]) -> None:
    stranger = factories.adapter({f"other.{name}": shape for name, shape in factories.SHAPES.items()})
    with pytest.raises(RefusedError, match=r"the prefix 'other\.'|covers none of the adapter's modules"):
        correct(stranger, factories.subspace(), Policy.csulora(1.0, **fate))


@pytest.mark.parametrize("fate", FATES)
def test_an_adapter_for_another_model_is_told_by_its_shapes(fate: dict[str, tuple[str, ...]]) -> None:
    adapter = factories.adapter({**factories.SHAPES, Q: (48, 40)})
    with pytest.raises(
        InputError, match=rf"module {Q} updates a \[48, 40\] matrix, but {Q} is \[40, 40\] in the subspace file"
    ):
        correct(adapter, factories.subspace(), Policy.csulora(1.0, **fate))


def undoing(share: float) -> tuple[Adapter, Subspace]:
    """An adapter that undoes this share of the alignment in one module."""
    subspace, adapter = factories.subspace(), factories.adapter(scale=1e-3)
    factors = subspace[UP]
    module = LoraModule(-share * factors.u * factors.s, factors.v.t().contiguous())
    return replace(adapter, modules=adapter.modules | {UP: module}), subspace


def test_reports_how_far_an_update_undoes_the_alignment() -> None:
    adapter, subspace = undoing(0.75)
    _, report = correct(adapter, subspace, Policy.csulora())
    by_name = {module.module: module for module in report.modules}
    assert by_name[UP].undo == pytest.approx(0.75, rel=1e-5)
    for name, module in adapter.modules.items():
        expected = oracle.undo(dense(module), subspace[name].u, subspace[name].s, subspace[name].v)
        assert by_name[name].undo == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert report.worst_undo == by_name[UP]


def test_an_update_that_undoes_too_much_is_refused() -> None:
    adapter, subspace = undoing(0.75)
    with pytest.raises(
        RefusedError, match=rf"module {UP} undoes 0\.750 of its alignment; the policy allows 0\.7 \(max_undo\); do not"
    ):
        correct(adapter, subspace, Policy.csulora(1.0, max_undo=0.7))
    correct(adapter, subspace, Policy.csulora(1.0, max_undo=0.8))
    reinforcing, subspace = undoing(-0.75)
    correct(reinforcing, subspace, Policy.csulora(1.0, max_undo=0.01))


def test_a_tuned_policy_goes_with_its_subspace_alone() -> None:
    subspace = factories.subspace()
    tuned = Policy.csulora(1.0, subspace_sha256=subspace.sha256)
    correct(factories.adapter(), subspace, tuned)
    with pytest.raises(RefusedError, match=f"tuned for the subspace file {subspace.sha256}, and this one is"):
        correct(factories.adapter(), factories.subspace(seed=9), tuned)


def test_an_override_that_matches_no_module_of_the_subspace_is_an_error() -> None:
    policy = Policy(overrides=(Override("k_proj", gains=(1, 1, 1, 1)),))
    with pytest.raises(InputError, match="override 'k_proj': matches no module of the subspace file"):
        correct(factories.adapter(), factories.subspace(), policy)


def test_an_override_may_be_for_modules_that_the_adapter_leaves_alone() -> None:
    adapter = factories.adapter({Q: factories.SHAPES[Q]})
    correct(adapter, factories.subspace(), Policy(overrides=(Override("up_proj", gains=(1, 1, 1, 1)),)))


def test_a_subspace_with_spoiled_factors_is_not_used() -> None:
    subspace = factories.subspace()
    subspace[Q].u[3, 1] = math.nan
    with pytest.raises(InputError, match=f"subspace: {Q}: the columns of u are not orthonormal"):
        correct(factories.adapter(), subspace, Policy.csulora())
    correct(factories.adapter({UP: factories.SHAPES[UP]}), subspace, Policy.csulora())


def test_an_update_that_overflows_its_storage_type_is_refused() -> None:
    adapter = factories.adapter(scale=1e5, dtype=torch.float16)
    with pytest.raises(InputError, match=rf"{DOWN}: the corrected update is too large for Half"):
        correct(adapter, factories.subspace(), Policy.none())


def test_a_module_that_alignment_did_not_move_is_off_subspace_altogether() -> None:
    fixed, report = correct(factories.adapter(), factories.subspace(rank=0), Policy.csulora(1.0))
    for module in report.modules:
        assert module.energies == {"aligned": 0, "left": 0, "right": 0, "off": 1}
        assert module.undo == 0
    for name, module in factories.adapter().modules.items():
        assert_close(fixed.modules[name], dense(module) / 2)


def test_the_report_and_a_card_go_with_the_adapter(tmp_path: Path) -> None:
    subspace = factories.subspace()
    fixed, report = correct(factories.adapter(), subspace, Policy.csulora())
    assert json.loads(fixed.documents["csulora_report.json"]) == json.loads(json.dumps(report.to_dict()))
    assert report.adapter == "adapter"
    assert report.adapter_sha256 == "ab" * 32
    assert report.subspace_sha256 == subspace.sha256
    assert report.fingerprints == subspace.fingerprints
    assert 'base_model: "org/base"' in fixed.documents["README.md"]


def test_a_basis_that_lies_by_columns_is_corrected_in_half_precision() -> None:
    """As slices of a decomposition do; a strip of it is padded further than one that lies by rows."""
    shapes = {"model.layers.0.mlp.up_proj": (64, 64)}
    found = factories.subspace(shapes, rank=4, dtype=torch.float16)
    for _ in range(20):
        fixed, _ = csulora.correct(
            factories.adapter(shapes, rank=8, dtype=torch.float16), found, csulora.Policy.csulora(1.0)
        )
        assert all(bool(module.b.isfinite().all()) for module in fixed.modules.values())
