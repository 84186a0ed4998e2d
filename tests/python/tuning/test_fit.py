"""The pieces of the fit against dense float64 twins, and what the fit as a whole must do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import csulora
import factories
import tiny_host
from csulora.errors import InputError, RefusedError
from csulora.policy.policy import Directions, Override, Policy
from csulora.tuning.controls import own_subspaces, random_subspaces
from csulora.tuning.fit import Case, Replies, fit, held_loss
from csulora.tuning.gains import PerDirection, PerModule, Reinforcing
from csulora.tuning.host import Host, agreeing, divergence
from csulora.tuning.options import Options
from csulora.tuning.probes import parse
from csulora.tuning.update import Update, pairs_of
from tolerances import COMPUTED, PROJECTOR

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = COMPUTED[torch.float32]


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found.double() - wanted.double()).norm()) <= TOLERANCE * float(wanted.double().norm())


@pytest.fixture(scope="module")
def pack(place: tiny_host.Place) -> csulora.Subspace:
    return csulora.Subspace.open(place.pack)


@pytest.fixture(scope="module")
def adapter(place: tiny_host.Place) -> csulora.Adapter:
    return csulora.load_adapter(place.adapters[0])


@pytest.fixture(scope="module")
def case(host: Host, place: tiny_host.Place, pack: csulora.Subspace, adapter: csulora.Adapter) -> Case:
    guard, keep = (parse(path.read_bytes()) for path in (place.guard, place.keep))
    guarded = host.replies(guard)
    with host.adapted(pairs_of(adapter)):
        kept = host.replies(keep)
    update = Update.of(adapter, pack)
    index = torch.arange(len(update.targets))
    return Case(update, index, Replies(guarded[:12], kept[:12]), Replies(guarded[12:], kept[12:]))


def test_the_parts_add_up_to_what_the_core_corrects(adapter: csulora.Adapter, pack: csulora.Subspace) -> None:
    update = Update.of(adapter, pack)
    gains = torch.rand(len(update.targets), 4, generator=factories.generator(1))
    rows = zip(update.targets.values(), gains.tolist(), strict=True)
    policy = Policy.none(rank="exact", overrides=tuple(Override(name, gains=tuple(row)) for name, row in rows))
    fixed, report = csulora.correct(adapter, pack, policy)
    mixed = update.mixed(gains)
    for name, (b, a) in mixed.items():
        assert close(b @ a, fixed.modules[name].b @ fixed.modules[name].a)
    assert float(update.relative_change2(mixed)) == pytest.approx(
        report.totals.relative_change**2, rel=PROJECTOR[torch.float16]
    )


def test_an_adapter_in_half_precision_is_split_in_float32(adapter: csulora.Adapter, pack: csulora.Subspace) -> None:
    half = {
        name: csulora.LoraModule(module.b.half(), module.a.half(), module.scale)
        for name, module in adapter.modules.items()
    }
    update = Update.of(csulora.Adapter(half, {}, Path("half"), ""), pack)
    for name, (b, a) in update.mixed(torch.ones(len(half), 4)).items():
        assert b.dtype == a.dtype == torch.float32
        assert close(b @ a, half[name].scale * half[name].b.float() @ half[name].a.float())


def test_what_is_kept_along_directions_is_what_correct_keeps(adapter: csulora.Adapter, pack: csulora.Subspace) -> None:
    update = Update.of(adapter, pack)
    k = min(module.rank for module in pack.values())
    gains = torch.rand(len(update.targets), 2, k, generator=factories.generator(2))
    rows = zip(update.targets.values(), gains.tolist(), strict=True)
    overrides = (Override(name, directions=Directions(*map(tuple, row))) for name, row in rows)
    fixed, report = csulora.correct(adapter, pack, Policy.none(overrides=tuple(overrides)))
    kept = update.along(gains)
    for name, (b, a) in kept.items():
        assert close(b @ a, fixed.modules[name].b @ fixed.modules[name].a)
    assert float(update.relative_change2(kept)) == pytest.approx(
        report.totals.relative_change**2, rel=PROJECTOR[torch.float16]
    )


def test_an_update_of_nothing_or_of_an_embedding_is_refused(adapter: csulora.Adapter, pack: csulora.Subspace) -> None:
    name = next(iter(adapter.modules))
    module = adapter.modules[name]
    nothing = csulora.LoraModule(torch.zeros_like(module.b), module.a)
    with pytest.raises(InputError, match="changes nothing"):
        Update.of(csulora.Adapter({name: nothing}, {}, Path("zero"), ""), pack)
    embedding = csulora.LoraModule(module.b, module.a, 1.0, is_embedding=True)
    with pytest.raises(RefusedError, match="is an embedding"):
        Update.of(csulora.Adapter({name: embedding}, {}, Path("embedding"), ""), pack)


def test_an_adapter_without_a_direction_in_the_pack_is_refused(adapter: csulora.Adapter) -> None:
    with pytest.raises(InputError, match="no direction of the alignment in any of the adapter's modules"):
        Update.of(adapter, factories.pack(tiny_host.MODULES, rank=0))


def test_the_host_computes_as_with_the_dense_update(host: Host, adapter: csulora.Adapter) -> None:
    dense = tiny_host.llama()
    weights = {name: weight.clone() for name, weight in host.model.state_dict().items()}
    for name, (b, a) in pairs_of(adapter).items():
        weights[f"{name}.weight"] += b @ a
    dense.load_state_dict(weights)
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad(), host.adapted(pairs_of(adapter)):
        adapted = host.model(input_ids=tokens).logits
    with torch.no_grad():
        assert close(adapted, dense(input_ids=tokens).logits)
        assert not close(host.model(input_ids=tokens).logits, adapted)  # and is as it was afterwards


def test_a_module_that_the_model_does_not_have_is_refused(host: Host) -> None:
    pair = torch.ones(32, 1), torch.ones(1, 32)
    with pytest.raises(InputError, match=r"no module model\.layers\.7"), host.adapted({"model.layers.7.mlp": pair}):
        pass
    name = "model.layers.0.self_attn.q_proj"
    with (
        pytest.raises(InputError, match=r"is \[32, 32\] in the model"),
        host.adapted({name: (torch.ones(9, 1), pair[1])}),
    ):
        pass


def test_a_model_or_device_that_is_not_there_is_named(place: tiny_host.Place, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transformers does not load this model"):
        Host.open(str(tmp_path / "none"), "cpu", tiny_host.REPLY)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            Host.open(str(place.aligned), "cuda", tiny_host.REPLY)


def test_replies_are_what_the_model_generates(host: Host, case: Case) -> None:
    for reply in case.held.guard:
        tokens = reply.tokens[: reply.start].tolist()
        with torch.no_grad():
            for wanted in reply.tokens[reply.start :].tolist():
                assert int(host.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()) == wanted
                tokens.append(wanted)
    assert all(agreeing(host, case.held.guard))


def test_divergence_is_kullbacks_and_leiblers(host: Host, case: Case) -> None:
    reply = case.held.keep[0]
    (logs,) = host.log_probabilities([reply.tokens], [reply.start])
    reference = torch.empty(logs.shape, dtype=torch.float64)
    reference.scatter_(1, reply.outcomes, reply.logs[:, :-1].double())  # the vocabulary is smaller than what is kept
    twin = (reference.exp() * (reference - logs.double())).sum(1).mean()
    assert float(divergence(reply, logs)) == pytest.approx(float(twin), rel=1e-3)
    own = case.held.guard[0]
    assert float(divergence(own, *host.log_probabilities([own.tokens], [own.start]))) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("form", ["components", "directions"])
def test_the_fit_finds_the_gains_that_made_the_replies(
    host: Host, place: tiny_host.Place, case: Case, form: str
) -> None:
    wanted = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(len(case.index), 4)
    with host.adapted(case.update.mixed(wanted)):
        guard, keep = (host.replies(parse(path.read_bytes())) for path in (place.guard, place.keep))
    made = Case(case.update, case.index, Replies(guard[:12], keep[:12]), Replies(guard[12:], keep[12:]))
    gains = PerModule(len(case.index)) if form == "components" else PerDirection(len(case.index), 4)
    options = Options(steps=60, keep=1.0, relative_change=0.0)
    first, second = (fit(host, [made], gains, options) for _ in range(2))
    assert torch.equal(first, second)  # to the bit
    uncorrected = held_loss(host, [made], gains, torch.full(gains.shape, 20.0), options)
    assert held_loss(host, [made], gains, first, options) < 0.1 * uncorrected
    assert not any(parameter.requires_grad for parameter in host.model.parameters())


@pytest.mark.parametrize("steps", [1, 5, 10, 13])
def test_a_fit_has_so_many_steps_and_looks_at_the_last(host: Host, case: Case, steps: int) -> None:
    gains, ticks = PerModule(len(case.index)), []
    options = Options(steps=steps, relative_change=10.0)  # which every step towards 1 makes smaller
    found = fit(host, [case], gains, options, lambda: ticks.append(1))
    assert len(ticks) == steps
    before = options if steps == 1 else replace(options, steps=steps - 1)
    assert not torch.equal(found, gains.start() if steps == 1 else fit(host, [case], gains, before))


def test_the_loss_adds_up_the_means_of_every_kind(host: Host, case: Case) -> None:
    gains, options = PerModule(len(case.index)), Options(keep=3.0, relative_change=0.2)
    corrected = gains.correct(gains.start(), case.index, case.update)
    held = Replies(case.held.guard, case.held.keep[:2], case.held.keep[1:])
    means = []
    with host.adapted(corrected):
        for kind in held.kinds:
            each = [divergence(one, *host.log_probabilities([one.tokens], [one.start])) for one in kind]
            means.append(float(sum(each)) / len(each))
    twin = means[0] + 3.0 * (means[1] + means[2]) + 0.2 * float(case.update.relative_change2(corrected))
    assert held_loss(host, [replace(case, held=held)], gains, gains.start(), options) == pytest.approx(twin, rel=1e-4)


def test_modules_that_are_kept_uncovered_are_there_while_gains_are_fitted(
    host: Host, case: Case, adapter: csulora.Adapter, pack: csulora.Subspace
) -> None:
    few = csulora.Subspace(dict(list(pack.items())[:2]), pack.provenance)
    kept, dropped = (Update.of(adapter, few, uncovered) for uncovered in ("keep", "drop"))
    gains, options = PerModule(2), Options(relative_change=0.0)
    whole = torch.full(gains.shape, 30.0)
    own = Replies((), case.held.keep)  # the adapter's with all of its modules
    losses = [
        held_loss(host, [Case(update, torch.arange(2), own, own)], gains, whole, options) for update in (kept, dropped)
    ]
    assert losses[0] == pytest.approx(0, abs=1e-4)
    assert losses[1] > 0.1
    assert set(kept.untouched) == set(adapter.modules) - set(kept.targets)


def test_so_many_held_back_prompts_do_not_run_together(host: Host, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = host.log_probabilities

    def counting(texts: list[Tensor], starts: list[int]) -> list[Tensor]:
        rows.append(len(texts))
        return original(texts, starts)

    monkeypatch.setattr(host, "log_probabilities", counting)
    gains, options = PerModule(len(case.index)), Options()
    every = Replies(case.held.guard * 50, case.held.keep * 10)
    many, few = (held_loss(host, [replace(case, held=h)], gains, gains.start(), options) for h in (every, case.held))
    assert many == pytest.approx(few, rel=1e-4)
    assert sum(rows[:-1]) == 60 * len(case.held.keep)
    assert max(rows) <= 64


def test_ordinary_prompts_are_fitted_to_as_keep_prompts_are(host: Host, case: Case) -> None:
    gains, options = PerModule(len(case.index)), Options(steps=20, keep=2.0)
    as_keep, as_ordinary = Replies((), case.fitted.guard), Replies((), (), case.fitted.guard)
    found = [fit(host, [replace(case, fitted=each, held=each)], gains, options) for each in (as_keep, as_ordinary)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], gains.start())


def test_what_the_held_back_prompts_do_not_bear_is_not_kept(host: Host, case: Case) -> None:
    opposed = Case(case.update, case.index, case.fitted, Replies(case.fitted.keep[:2], case.fitted.guard[:2]))
    gains, options = PerModule(len(case.index)), Options(steps=40, learning_rate=2.0)
    found = held_loss(host, [opposed], gains, fit(host, [opposed], gains, options), options)
    assert found <= held_loss(host, [opposed], gains, gains.start(), options)


def test_one_gain_per_module_is_four_equal_ones(case: Case) -> None:
    gains = PerModule(len(case.index), components=1)
    values = gains(torch.randn(gains.shape), case.index, case.update.energies)
    assert torch.equal(values, values[:, :1].expand(-1, 4))


@pytest.mark.parametrize("reference_energy", [None, 0.05, 0.9, 1.0])
def test_what_is_restored_is_what_correct_restores(
    case: Case, adapter: csulora.Adapter, pack: csulora.Subspace, reference_energy: float | None
) -> None:
    gains = Reinforcing(len(case.index), 3)
    assert not gains.gains(gains.start())[:, 2].any()
    parameters = torch.randn(gains.shape, generator=torch.Generator().manual_seed(0))
    update = case.update if reference_energy is None else case.update.with_penalty_scale(3, reference_energy)
    fitted = gains.correct(parameters, case.index, update)
    values = gains.gains(parameters)
    names = [case.update.targets[name] for name in fitted]
    overrides = tuple(
        Override(name, directions=Directions(*(tuple(row[: pack[name].rank].tolist()) for row in values[at])))
        for at, name in zip(case.index.tolist(), names, strict=True)
    )
    fixed, _ = csulora.correct(adapter, pack, Policy.none(overrides=overrides, reference_energy=reference_energy))
    for name, (b, a) in fitted.items():
        assert fixed.modules[name].rank == adapter.modules[name].rank + min(3, pack[case.update.targets[name]].rank)
        assert close(b @ a, fixed.modules[name].b @ fixed.modules[name].a)


def test_the_updates_own_subspace_holds_its_leading_directions(
    adapter: csulora.Adapter, pack: csulora.Subspace
) -> None:
    own = own_subspaces(pack, adapter, {name: name for name in adapter.modules})
    for name, module in adapter.modules.items():
        u, s, vt = torch.linalg.svd(module.b.double() @ module.a.double(), full_matrices=False)
        k = own[name].rank
        best = u[:, :k] * s[:k] @ vt[:k]
        assert k == pack[name].rank
        assert close(own[name].u * own[name].s @ own[name].v.T, best)


def test_the_energy_along_all_directions_of_an_update_is_1(adapter: csulora.Adapter, pack: csulora.Subspace) -> None:
    few = {
        name: csulora.LoraModule(module.b[:, :2], module.a[:2], module.scale)
        for name, module in adapter.modules.items()
    }
    low_rank = csulora.Adapter(few, {}, Path("few"), "")
    update = Update.of(low_rank, own_subspaces(pack, low_rank, {name: name for name in few}))
    none, one, two, more = (update.energy_along(directions) for directions in (0, 1, 2, 64))
    assert none == 0 < one < two == more <= 1  # a policy's reference energy must not exceed 1
    assert two == pytest.approx(1)


def test_random_subspaces_are_orthonormal_and_seeded(pack: csulora.Subspace) -> None:
    first, again, other = (random_subspaces(pack, seed) for seed in (1, 1, 2))
    for name, module in first.items():
        assert module.rank == pack[name].rank
        assert close(module.u.T @ module.u, torch.eye(module.rank))
        assert torch.equal(module.u, again[name].u)
        assert not torch.equal(module.u, other[name].u)
    first.to_core(first)  # the core accepts them
