"""Scopes, against their dense formula."""

import pytest
import torch
from transformers import LlamaForCausalLM

import factories
import tiny_host
from csulora.tuning import inputs
from csulora.tuning.host import Host
from csulora.tuning.inputs import guard_inputs, input_filter_between, keep_inputs
from csulora.tuning.probes import Chat, Message
from tolerances import COMPUTED

pytestmark = pytest.mark.usefixtures("one_thread")

GUARD = factories.gaussian(20, 24, seed=1)
KEEP = [factories.gaussian(30, 24, seed=2), factories.gaussian(10, 24, seed=3)]


@pytest.mark.parametrize("kind", [KEEP, KEEP[1:]], ids=["more inputs than coordinates", "fewer"])
def test_an_input_filter_is_its_closed_form(kind: list[torch.Tensor]) -> None:
    input_filter = input_filter_between(GUARD, [kind])
    guard, *keep = (x.double().T @ x.double() / len(x) for x in (GUARD, *kind))
    rest = inputs.KEEP_WEIGHT * sum(keep) / len(kind) + inputs.ISOTROPIC * guard.trace() / 24 * torch.eye(24)
    wanted = guard @ torch.linalg.inv(guard + rest)
    found = input_filter.p.double() @ input_filter.q.double().T
    assert float((found - wanted).norm() / wanted.norm()) <= COMPUTED[torch.float32]


def test_every_kind_of_prompt_weighs_the_same() -> None:
    """Copies of one kind's inputs change nothing; a second kind is left alone as the first is."""
    ordinary = factories.gaussian(12, 24, seed=5)
    input_filter, copied = (input_filter_between(GUARD, [kind, [ordinary]]) for kind in (KEEP, KEEP * 3))
    guard, *keep, other = (x.double().T @ x.double() / len(x) for x in (GUARD, *KEEP, ordinary))
    rest = inputs.KEEP_WEIGHT * (sum(keep) / 2 + other) + inputs.ISOTROPIC * guard.trace() / 24 * torch.eye(24)
    wanted = guard @ torch.linalg.inv(guard + rest)
    for each in (input_filter, copied):
        found = each.p.double() @ each.q.double().T
        assert float((found - wanted).norm() / wanted.norm()) <= COMPUTED[torch.float32]


def test_no_update_is_better_corrected_by_another_input_filter() -> None:
    """Its gradient is 0 there, and the problem is convex."""
    input_filter, update = input_filter_between(GUARD, [KEEP]), factories.gaussian(8, 24, seed=4).double()
    x = (update - update @ input_filter.p.double() @ input_filter.q.double().T).requires_grad_()
    isotropic = inputs.ISOTROPIC * GUARD.double().square().mean()
    removed = (x @ GUARD.double().T).square().sum() / len(GUARD)
    kept = sum(((x - update) @ k.double().T).square().sum() / len(k) for k in KEEP) / len(KEEP)
    (removed + inputs.KEEP_WEIGHT * kept + isotropic * (x - update).square().sum()).backward()
    assert float(x.grad.norm()) <= 1e-5 * float(update.norm() * GUARD.norm() ** 2)


def test_few_directions_are_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keep prompts bring nothing, F has the eigenvectors of the guard inputs' second moments."""
    monkeypatch.setattr(inputs, "MOST_DIRECTIONS", 3)
    input_filter = input_filter_between(GUARD, [[torch.zeros(1, 24)]])
    values, vectors = torch.linalg.eigh(GUARD.double().T @ GUARD.double() / len(GUARD))
    rest = inputs.ISOTROPIC * values.sum() / 24
    wanted = (vectors[:, -3:] * (values[-3:] / (values[-3:] + rest))) @ vectors[:, -3:].T
    found = input_filter.p.double() @ input_filter.q.double().T
    assert float((found - wanted).norm() / wanted.norm()) <= COMPUTED[torch.float32]


def test_an_input_filter_of_nothing_is_nothing() -> None:
    input_filter = input_filter_between(torch.zeros(3, 24), [KEEP])
    assert not (input_filter.p @ input_filter.q.T).any()


@pytest.fixture
def host() -> Host:
    model: LlamaForCausalLM = tiny_host.llama()
    return Host(model, tiny_host.tokenizer(), tiny_host.REPLY)


def test_inputs_are_those_that_the_modules_see(host: Host) -> None:
    chats: list[Chat] = [(Message("user", line),) for line in tiny_host.prompts("w3", 20).splitlines()]
    replies = host.replies(chats)
    name = "model.layers.1.self_attn.o_proj"
    seen: list[torch.Tensor] = []
    hook = host.model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    for reply in replies:
        host.model(input_ids=reply.tokens[None])
    hook.remove()
    whole, decided = (collect(host, [name], replies)[name] for collect in (keep_inputs, guard_inputs))
    torch.testing.assert_close(whole, torch.cat(seen))
    starts = [reply.start - 1 for reply in replies]
    torch.testing.assert_close(decided, torch.cat([x[start:] for x, start in zip(seen, starts, strict=True)]))


def test_modules_that_do_not_see_every_token_are_left_out(host: Host) -> None:
    replies = host.replies([(Message("user", "w1 w2"),)])
    name = "model.layers.0.mlp"
    mlp = host.model.get_submodule(name)
    hook = mlp.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1),))  # as a router calls an expert
    inner = mlp.register_forward_hook(lambda *given: given[2][None])
    found = keep_inputs(host, [f"{name}.up_proj", "model.layers.0.self_attn.q_proj"], replies)
    hook.remove()
    inner.remove()
    assert list(found) == ["model.layers.0.self_attn.q_proj"]


def test_of_very_many_tokens_some_are_taken(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = host.replies([(Message("user", line),) for line in tiny_host.prompts("w3", 20).splitlines()])
    name = "model.layers.0.mlp.down_proj"
    every = keep_inputs(host, [name], replies)[name]
    monkeypatch.setattr(inputs, "MOST_INPUTS", 30)
    some = keep_inputs(host, [name], replies)[name]
    torch.testing.assert_close(some, every[:: 1 + (len(every) - 1) // 30])
    assert len(some) <= 30
