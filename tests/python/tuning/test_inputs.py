"""Input filters, against their dense formula."""

import pytest
import torch
from transformers import LlamaForCausalLM

import factories
import tiny_model
from csulora.tuning import inputs
from csulora.tuning.inputs import input_filter_between, safety_inputs, task_inputs
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.probes import Chat, Message
from tolerances import COMPUTED

pytestmark = pytest.mark.usefixtures("one_thread")

SAFETY = factories.gaussian(20, 24, seed=1)
TASK = [factories.gaussian(30, 24, seed=2), factories.gaussian(10, 24, seed=3)]


@pytest.mark.parametrize("kind", [TASK, TASK[1:]], ids=["more inputs than coordinates", "fewer"])
def test_an_input_filter_is_its_closed_form(kind: list[torch.Tensor]) -> None:
    input_filter = input_filter_between(SAFETY, [kind])
    safety, *task = (x.double().T @ x.double() / len(x) for x in (SAFETY, *kind))
    rest = inputs.TASK_WEIGHT * sum(task) / len(kind) + inputs.ISOTROPIC * safety.trace() / 24 * torch.eye(24)
    wanted = safety @ torch.linalg.inv(safety + rest)
    found = input_filter.p.double() @ input_filter.q.double().T
    assert float((found - wanted).norm() / wanted.norm()) <= COMPUTED[torch.float32]


def test_every_kind_of_prompt_weighs_the_same() -> None:
    """Copies of one kind's inputs change nothing; a second kind is left alone as the first is."""
    general = factories.gaussian(12, 24, seed=5)
    input_filter, copied = (input_filter_between(SAFETY, [kind, [general]]) for kind in (TASK, TASK * 3))
    safety, *task, other = (x.double().T @ x.double() / len(x) for x in (SAFETY, *TASK, general))
    rest = inputs.TASK_WEIGHT * (sum(task) / 2 + other) + inputs.ISOTROPIC * safety.trace() / 24 * torch.eye(24)
    wanted = safety @ torch.linalg.inv(safety + rest)
    for each in (input_filter, copied):
        found = each.p.double() @ each.q.double().T
        assert float((found - wanted).norm() / wanted.norm()) <= COMPUTED[torch.float32]


def test_no_update_is_better_corrected_by_another_input_filter() -> None:
    """Its gradient is 0 there, and the problem is convex."""
    input_filter, update = input_filter_between(SAFETY, [TASK]), factories.gaussian(8, 24, seed=4).double()
    x = (update - update @ input_filter.p.double() @ input_filter.q.double().T).requires_grad_()
    isotropic = inputs.ISOTROPIC * SAFETY.double().square().mean()
    removed = (x @ SAFETY.double().T).square().sum() / len(SAFETY)
    kept = sum(((x - update) @ k.double().T).square().sum() / len(k) for k in TASK) / len(TASK)
    (removed + inputs.TASK_WEIGHT * kept + isotropic * (x - update).square().sum()).backward()
    assert float(x.grad.norm()) <= 1e-5 * float(update.norm() * SAFETY.norm() ** 2)


def test_few_directions_are_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where task prompts bring nothing, F has the eigenvectors of the safety inputs' second moments."""
    monkeypatch.setattr(inputs, "MOST_DIRECTIONS", 3)
    input_filter = input_filter_between(SAFETY, [[torch.zeros(1, 24)]])
    values, vectors = torch.linalg.eigh(SAFETY.double().T @ SAFETY.double() / len(SAFETY))
    rest = inputs.ISOTROPIC * values.sum() / 24
    wanted = (vectors[:, -3:] * (values[-3:] / (values[-3:] + rest))) @ vectors[:, -3:].T
    found = input_filter.p.double() @ input_filter.q.double().T
    assert float((found - wanted).norm() / wanted.norm()) <= COMPUTED[torch.float32]


def test_an_input_filter_of_nothing_is_nothing() -> None:
    input_filter = input_filter_between(torch.zeros(3, 24), [TASK])
    assert not (input_filter.p @ input_filter.q.T).any()


@pytest.fixture
def language_model() -> LanguageModel:
    model: LlamaForCausalLM = tiny_model.llama()
    return LanguageModel(model, tiny_model.tokenizer(), tiny_model.REPLY)


def test_inputs_are_those_that_the_modules_see(language_model: LanguageModel) -> None:
    chats: list[Chat] = [(Message("user", line),) for line in tiny_model.prompts("w3", 20).splitlines()]
    replies = language_model.replies(chats)
    name = "model.layers.1.self_attn.o_proj"
    seen: list[torch.Tensor] = []
    hook = language_model.model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    for reply in replies:
        language_model.model(input_ids=reply.tokens[None])
    hook.remove()
    whole, decided = (collect(language_model, [name], replies)[name] for collect in (task_inputs, safety_inputs))
    torch.testing.assert_close(whole, torch.cat(seen))
    starts = [reply.start - 1 for reply in replies]
    torch.testing.assert_close(decided, torch.cat([x[start:] for x, start in zip(seen, starts, strict=True)]))


def test_modules_that_do_not_see_every_token_are_left_out(language_model: LanguageModel) -> None:
    replies = language_model.replies([(Message("user", "w1 w2"),)])
    name = "model.layers.0.mlp"
    mlp = language_model.model.get_submodule(name)
    hook = mlp.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1),))  # as a router calls an expert
    inner = mlp.register_forward_hook(lambda *given: given[2][None])
    found = task_inputs(language_model, [f"{name}.up_proj", "model.layers.0.self_attn.q_proj"], replies)
    hook.remove()
    inner.remove()
    assert list(found) == ["model.layers.0.self_attn.q_proj"]


def test_of_very_many_tokens_some_are_taken(language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = language_model.replies([(Message("user", line),) for line in tiny_model.prompts("w3", 20).splitlines()])
    name = "model.layers.0.mlp.down_proj"
    every = task_inputs(language_model, [name], replies)[name]
    monkeypatch.setattr(inputs, "MOST_INPUTS", 30)
    some = task_inputs(language_model, [name], replies)[name]
    torch.testing.assert_close(some, every[:: 1 + (len(every) - 1) // 30])
    assert len(some) <= 30
