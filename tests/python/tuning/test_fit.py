"""The pieces of the fit against dense float64 twins, and what the fit as a whole must do."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import csulora
import factories
import tiny_model
from csulora.correction.controls.subspaces import own_subspaces, random_subspaces
from csulora.errors import InputError, RefusedError
from csulora.policy.overrides import Directions, Override
from csulora.policy.policy import Policy
from csulora.subspace.input_filter import InputFilter
from csulora.tuning.fit import Case, Replies, fit, loss_of
from csulora.tuning.gains import PerDirection, PerModule, Reinforcing
from csulora.tuning.language_model import LanguageModel, agreeing
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options
from csulora.tuning.probes import parse
from csulora.tuning.replies import Reply, divergences
from csulora.tuning.update import Update, factors_of
from tolerances import COMPUTED, PROJECTOR

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = COMPUTED[torch.float32]


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found.double() - wanted.double()).norm()) <= TOLERANCE * float(wanted.double().norm())


@pytest.fixture(scope="module")
def subspace(place: tiny_model.Place) -> csulora.Subspace:
    return csulora.Subspace.open(place.subspace)


@pytest.fixture(scope="module")
def adapter(place: tiny_model.Place) -> csulora.Adapter:
    return csulora.load_adapter(place.adapters[0])


@pytest.fixture(scope="module")
def replies(language_model: LanguageModel, place: tiny_model.Place, adapter: csulora.Adapter) -> Replies:
    safety, task = (parse(path.read_bytes()) for path in (place.safety, place.task))
    safety_kept = language_model.replies(safety)
    with language_model.adapted(factors_of(adapter)):
        return Replies(safety_kept, language_model.replies(task))


@pytest.fixture(scope="module")
def others(replies: Replies) -> Replies:
    """What no fit has."""
    return Replies(replies.safety[12:], replies.task[12:])


@pytest.fixture(scope="module")
def case(adapter: csulora.Adapter, subspace: csulora.Subspace, replies: Replies) -> Case:
    update = Update.of(adapter, subspace)
    return Case(update, torch.arange(len(update.targets)), Replies(replies.safety[:12], replies.task[:12]))


def test_the_components_add_up_to_what_the_core_corrects(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    update = Update.of(adapter, subspace)
    gains = torch.rand(len(update.targets), 4, generator=factories.generator(1))
    rows = zip(update.targets.values(), gains.tolist(), strict=True)
    policy = Policy.none(rank="exact", overrides=tuple(Override(name, gains=tuple(row)) for name, row in rows))
    fixed, report = csulora.correct(adapter, subspace, policy)
    mixed = update.mixed(gains)
    for name, (b, a) in mixed.items():
        assert close(b @ a, fixed.modules[name].b @ fixed.modules[name].a)
    assert float(update.relative_change2(mixed)) == pytest.approx(
        report.totals.relative_change**2, rel=PROJECTOR[torch.float16]
    )


def test_an_adapter_in_half_precision_is_split_in_float32(adapter: csulora.Adapter, subspace: csulora.Subspace) -> None:
    half = {
        name: csulora.LoraModule(module.b.half(), module.a.half(), module.scale)
        for name, module in adapter.modules.items()
    }
    update = Update.of(csulora.Adapter(half, {}, Path("half"), ""), subspace)
    for name, (b, a) in update.mixed(torch.ones(len(half), 4)).items():
        assert b.dtype == a.dtype == torch.float32
        assert close(b @ a, half[name].scale * half[name].b.float() @ half[name].a.float())


def test_what_is_kept_along_directions_is_what_correct_keeps(
    adapter: csulora.Adapter, subspace: csulora.Subspace
) -> None:
    update = Update.of(adapter, subspace)
    k = min(module.rank for module in subspace.values())
    gains = torch.rand(len(update.targets), 2, k, generator=factories.generator(2))
    rows = zip(update.targets.values(), gains.tolist(), strict=True)
    overrides = (Override(name, directions=Directions(*map(tuple, row))) for name, row in rows)
    fixed, report = csulora.correct(adapter, subspace, Policy.none(overrides=tuple(overrides)))
    kept = update.along(gains)
    for name, (b, a) in kept.items():
        assert close(b @ a, fixed.modules[name].b @ fixed.modules[name].a)
    assert float(update.relative_change2(kept)) == pytest.approx(
        report.totals.relative_change**2, rel=PROJECTOR[torch.float16]
    )


def test_an_update_of_nothing_or_of_an_embedding_is_refused(
    adapter: csulora.Adapter, subspace: csulora.Subspace
) -> None:
    name = next(iter(adapter.modules))
    module = adapter.modules[name]
    nothing = csulora.LoraModule(torch.zeros_like(module.b), module.a)
    with pytest.raises(InputError, match="changes nothing"):
        Update.of(csulora.Adapter({name: nothing}, {}, Path("zero"), ""), subspace)
    embedding = csulora.LoraModule(module.b, module.a, 1.0, is_embedding=True)
    with pytest.raises(RefusedError, match="is an embedding"):
        Update.of(csulora.Adapter({name: embedding}, {}, Path("embedding"), ""), subspace)


def test_an_adapter_without_a_direction_in_the_subspace_is_refused(adapter: csulora.Adapter) -> None:
    with pytest.raises(InputError, match="no direction of the alignment in any of the adapter's modules"):
        Update.of(adapter, factories.subspace(tiny_model.MODULES, rank=0))


def test_the_language_model_computes_as_with_the_dense_update(
    language_model: LanguageModel, adapter: csulora.Adapter
) -> None:
    dense = tiny_model.llama()
    weights = {name: weight.clone() for name, weight in language_model.model.state_dict().items()}
    for name, (b, a) in factors_of(adapter).items():
        weights[f"{name}.weight"] += b @ a
    dense.load_state_dict(weights)
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad(), language_model.adapted(factors_of(adapter)):
        adapted = language_model.model(input_ids=tokens).logits
    with torch.no_grad():
        assert close(adapted, dense(input_ids=tokens).logits)
        assert not close(language_model.model(input_ids=tokens).logits, adapted)  # and is as it was afterwards


def test_a_module_is_found_by_any_spelling_of_wrappers(language_model: LanguageModel, adapter: csulora.Adapter) -> None:
    factors, tokens = factors_of(adapter), torch.arange(4, 20)[None]
    spelled = {name.replace("model.", "language_model.model.", 1): pair for name, pair in factors.items()}
    with torch.no_grad(), language_model.adapted(factors):
        expected = language_model.model(input_ids=tokens).logits
    with torch.no_grad(), language_model.adapted(spelled):
        assert torch.equal(language_model.model(input_ids=tokens).logits, expected)


def test_a_module_that_the_model_does_not_have_is_refused(language_model: LanguageModel) -> None:
    pair = torch.ones(32, 1), torch.ones(1, 32)
    with (
        pytest.raises(InputError, match=r"no module model\.layers\.7"),
        language_model.adapted({"model.layers.7.mlp": pair}),
    ):
        pass
    name = "model.layers.0.self_attn.q_proj"
    with (
        pytest.raises(InputError, match=r"is \[32, 32\] in the model"),
        language_model.adapted({name: (torch.ones(9, 1), pair[1])}),
    ):
        pass


def test_a_model_or_device_that_is_not_there_is_named(place: tiny_model.Place, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory; a hub id is written org/name"):
        LanguageModel.open(str(tmp_path / "none"), Loading("cpu"), tiny_model.REPLY)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            LanguageModel.open(str(place.aligned), Loading("cuda"), tiny_model.REPLY)


def test_a_module_is_corrected_on_its_own_device(case: Case) -> None:
    elsewhere = list(case.update.factors)[1]
    selected = {
        name: InputFilter(torch.ones(a.shape[1], 1), torch.ones(a.shape[1], 1))
        for name, (_, a) in case.update.factors.items()
    }
    update = replace(case.update, input_filters=selected)
    update = update.to(torch.device("cpu"), lambda name: torch.device("meta" if name == elsewhere else "cpu"))
    assert [name for name, each in update.input_filters.items() if each.p.device.type == "meta"] == [elsewhere]
    gains = PerDirection(len(case.index), 3), PerModule(len(case.index)), Reinforcing(len(case.index), 2)
    for each in gains:
        for name, factors in each.correct(each.start(), case.index, update).items():
            assert {factor.device.type for factor in factors} == {"meta" if name == elsewhere else "cpu"}


def test_replies_are_what_the_model_generates(language_model: LanguageModel, others: Replies) -> None:
    for reply in others.safety:
        tokens = reply.tokens[: reply.start].tolist()
        with torch.no_grad():
            for wanted in reply.tokens[reply.start :].tolist():
                assert int(language_model.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()) == wanted
                tokens.append(wanted)
    assert all(agreeing(language_model, others.safety))


def divergence(language_model: LanguageModel, reply: Reply) -> float:
    return float(divergences([reply], language_model.logits([reply.tokens], [reply.start])))


def test_divergence_is_kullbacks_and_leiblers(language_model: LanguageModel, others: Replies) -> None:
    reply = others.task[0]
    logs = language_model.logits([reply.tokens], [reply.start]).log_softmax(-1)
    reference = torch.empty(logs.shape, dtype=torch.float64)
    reference.scatter_(1, reply.outcomes, reply.logs[:, :-1].double())  # the vocabulary is smaller than what is kept
    twin = (reference.exp() * (reference - logs.double())).sum(1).mean()
    assert divergence(language_model, reply) == pytest.approx(float(twin), rel=1e-3)
    assert divergence(language_model, others.safety[0]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("form", ["components", "directions"])
def test_the_fit_finds_the_gains_that_made_the_replies(
    language_model: LanguageModel, place: tiny_model.Place, case: Case, form: str
) -> None:
    wanted = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(len(case.index), 4)
    with language_model.adapted(case.update.mixed(wanted)):
        safety, task = (language_model.replies(parse(path.read_bytes())) for path in (place.safety, place.task))
    made, unfitted = replace(case, fitted=Replies(safety[:12], task[:12])), Replies(safety[12:], task[12:])
    gains = PerModule(len(case.index)) if form == "components" else PerDirection(len(case.index), 4)
    options = Options(steps=60, task_weight=1.0, relative_change_weight=0.0)
    first, second = (fit(language_model, [made], gains, options) for _ in range(2))
    assert torch.equal(first, second)  # to the bit
    found, uncorrected = (
        float(loss_of(language_model, made, unfitted, gains, parameters, options))
        for parameters in (first, torch.full(gains.shape, 20.0))
    )
    assert found < 0.1 * uncorrected
    assert not any(parameter.requires_grad for parameter in language_model.model.parameters())


@pytest.mark.parametrize("steps", [1, 5])
def test_a_fit_has_so_many_steps(language_model: LanguageModel, case: Case, steps: int) -> None:
    gains, ticks = PerModule(len(case.index)), []
    options = Options(steps=steps, relative_change_weight=10.0)
    found = fit(language_model, [case], gains, options, lambda: ticks.append(1))
    assert len(ticks) == steps
    assert not torch.equal(found, gains.start())
    assert not found.requires_grad


def test_steps_become_smaller_so_that_the_last_is_the_one_to_take(language_model: LanguageModel, case: Case) -> None:
    gains, options = PerModule(len(case.index)), Options(steps=4, learning_rate=0.1)
    seen = [gains.start()]
    original = gains.correct

    def spy(parameters: Tensor, index: Tensor, update: Update) -> dict[str, tuple[Tensor, Tensor]]:
        seen.append(parameters.detach().clone())
        return original(parameters, index, update)

    gains.correct = spy  # type: ignore[method-assign]
    seen.append(fit(language_model, [case], gains, options))
    lengths = [float((after - before).abs().max()) for before, after in pairwise(seen[1:])]
    assert lengths == pytest.approx([0.1, 0.075, 0.05, 0.025], rel=0.2)  # Adam's steps are as long as its rate


def test_the_loss_adds_up_the_means_of_every_kind(language_model: LanguageModel, case: Case, others: Replies) -> None:
    gains, options = PerModule(len(case.index)), Options(task_weight=3.0, relative_change_weight=0.2)
    corrected = gains.correct(gains.start(), case.index, case.update)
    given = Replies(others.safety, others.task[:2], others.task[1:])
    means = []
    with language_model.adapted(corrected):
        for kind in given.kinds:
            means.append(sum(divergence(language_model, one) for one in kind) / len(kind))
    twin = means[0] + 3.0 * (means[1] + means[2]) + 0.2 * float(case.update.relative_change2(corrected))
    found = float(loss_of(language_model, case, given, gains, gains.start(), options))
    assert found == pytest.approx(twin, rel=1e-4)


def test_modules_that_are_kept_uncovered_are_there_while_gains_are_fitted(
    language_model: LanguageModel, others: Replies, adapter: csulora.Adapter, subspace: csulora.Subspace
) -> None:
    few = csulora.Subspace(dict(list(subspace.items())[:2]), subspace.provenance)
    kept = Update.of(adapter, few, Policy.none(keep_uncovered=("*",)))
    dropped = Update.of(adapter, few, Policy.none(drop_uncovered=("*",)))
    gains, options = PerModule(2), Options(relative_change_weight=0.0)
    whole = torch.full(gains.shape, 30.0)
    own = Replies((), others.task)  # the adapter's with all of its modules
    losses = [
        float(loss_of(language_model, Case(update, torch.arange(2), own), own, gains, whole, options))
        for update in (kept, dropped)
    ]
    assert losses[0] == pytest.approx(0, abs=1e-4)
    assert losses[1] > 0.1
    assert set(kept.untouched) == set(adapter.modules) - set(kept.targets)


def test_so_many_prompts_do_not_run_together(
    language_model: LanguageModel, case: Case, others: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    original = language_model.logits

    def counting(texts: list[Tensor], starts: list[int]) -> Tensor:
        rows.append(len(texts))
        return original(texts, starts)

    monkeypatch.setattr(language_model, "logits", counting)
    gains, options = PerModule(len(case.index)), Options()
    every = Replies([*others.safety] * 50, [*others.task] * 10)
    with torch.no_grad():
        many, few = (float(loss_of(language_model, case, h, gains, gains.start(), options)) for h in (every, others))
    assert many == pytest.approx(few, rel=1e-4)
    assert sum(rows[:-1]) == 60 * len(others.task)
    assert max(rows) <= 64


def test_general_prompts_are_fitted_to_as_task_prompts_are(language_model: LanguageModel, case: Case) -> None:
    gains, options = PerModule(len(case.index)), Options(steps=20, task_weight=2.0)
    as_task, as_general = Replies((), case.fitted.safety), Replies((), (), case.fitted.safety)
    found = [fit(language_model, [replace(case, fitted=each)], gains, options) for each in (as_task, as_general)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], gains.start())


def test_one_gain_per_module_is_four_equal_ones(case: Case) -> None:
    gains = PerModule(len(case.index), components=1)
    values = gains(torch.randn(gains.shape), case.index, case.update.energies)
    assert torch.equal(values, values[:, :1].expand(-1, 4))


@pytest.mark.parametrize("reference_energy", [None, 0.05, 0.9, 1.0])
def test_what_is_restored_is_what_correct_restores(
    case: Case, adapter: csulora.Adapter, subspace: csulora.Subspace, reference_energy: float | None
) -> None:
    gains = Reinforcing(len(case.index), 3)
    assert not gains.gains(gains.start())[:, 2].any()
    parameters = torch.randn(gains.shape, generator=torch.Generator().manual_seed(0))
    update = case.update if reference_energy is None else case.update.with_penalty_scale(3, reference_energy)
    fitted = gains.correct(parameters, case.index, update)
    values = gains.gains(parameters)
    names = [case.update.targets[name] for name in fitted]
    overrides = tuple(
        Override(name, directions=Directions(*(tuple(row[: subspace[name].rank].tolist()) for row in values[at])))
        for at, name in zip(case.index.tolist(), names, strict=True)
    )
    fixed, _ = csulora.correct(adapter, subspace, Policy.none(overrides=overrides, reference_energy=reference_energy))
    for name, (b, a) in fitted.items():
        assert fixed.modules[name].rank == adapter.modules[name].rank + min(3, subspace[case.update.targets[name]].rank)
        assert close(b @ a, fixed.modules[name].b @ fixed.modules[name].a)


def test_the_updates_own_subspace_holds_its_leading_directions(
    adapter: csulora.Adapter, subspace: csulora.Subspace
) -> None:
    own = own_subspaces(subspace, adapter, {name: name for name in adapter.modules})
    for name, module in adapter.modules.items():
        u, s, vt = torch.linalg.svd(module.b.double() @ module.a.double(), full_matrices=False)
        k = own[name].rank
        best = u[:, :k] * s[:k] @ vt[:k]
        assert k == subspace[name].rank
        assert close(own[name].u * own[name].s @ own[name].v.T, best)


def test_the_energy_along_all_directions_of_an_update_is_1(
    adapter: csulora.Adapter, subspace: csulora.Subspace
) -> None:
    few = {
        name: csulora.LoraModule(module.b[:, :2], module.a[:2], module.scale)
        for name, module in adapter.modules.items()
    }
    low_rank = csulora.Adapter(few, {}, Path("few"), "")
    update = Update.of(low_rank, own_subspaces(subspace, low_rank, {name: name for name in few}))
    none, one, two, more = (update.energy_along(directions) for directions in (0, 1, 2, 64))
    assert none == 0 < one < two == more <= 1  # a policy's reference energy must not exceed 1
    assert two == pytest.approx(1)


def test_random_subspaces_are_orthonormal_and_seeded(subspace: csulora.Subspace) -> None:
    first, again, other = (random_subspaces(subspace, seed) for seed in (1, 1, 2))
    for name, module in first.items():
        assert module.rank == subspace[name].rank
        assert close(module.u.T @ module.u, torch.eye(module.rank))
        assert torch.equal(module.u, again[name].u)
        assert not torch.equal(module.u, other[name].u)
    first.to_core(first)  # the core accepts them
