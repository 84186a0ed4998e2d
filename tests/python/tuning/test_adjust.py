"""`csulora adjust`: the strength of a policy for adapters to come, by what a corrected adapter says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import csulora
import tiny_model
from csulora.errors import InputError, RefusedError
from csulora.policy.overrides import Directions, Override
from csulora.policy.policy import Policy
from csulora.policy.provenance import PolicyProvenance
from csulora.tuning import adjust, probes
from csulora.tuning.adjust import MOST, MOST_TRIALS, STEP, Adjuster, Kept, Own
from csulora.tuning.frontier import Rate
from csulora.tuning.language_model import LanguageModel, agreeing
from csulora.tuning.update import factors_of

pytestmark = pytest.mark.usefixtures("one_thread")


def carried(multiple: float) -> Policy:
    """A policy that gives back so much of what the tiny adapters undo."""
    keep = (1.0, 1.0)
    return Policy.none(overrides=(Override("*", directions=Directions(keep, keep, (multiple, multiple))),))


@pytest.fixture(scope="module")
def adjuster(language_model: LanguageModel, place: tiny_model.Place) -> Adjuster:
    return Adjuster(language_model, probes.read(place.safety))


Shares = tuple[int, ...]  # safety, general and perhaps task prompts that are kept, of 16 or 32
Keeping = Callable[[dict[float, Shares]], None]


@pytest.fixture
def keeping(adjuster: Adjuster, monkeypatch: pytest.MonkeyPatch) -> Keeping:
    """Let what is kept at each strength be as a table says."""

    def keeping(table: dict[float, Shares]) -> None:
        tried: list[float] = []

        def corrected(
            adapter: csulora.Adapter, subspace: csulora.Subspace, policy: Policy
        ) -> tuple[csulora.Adapter, None]:
            assert policy.overrides[0].directions is not None
            tried.append(policy.overrides[0].directions.reinforced[0])
            return adapter, None

        def kept(self: Adjuster, *_: object) -> Kept:
            count = 32 if max(map(max, table.values())) > 16 else 16
            return Kept(*(Rate.of(kept, count) for kept in table[tried[-1]]))

        monkeypatch.setattr(adjust, "correct", corrected)
        monkeypatch.setattr(Adjuster, "kept", kept)

    return keeping


@pytest.mark.parametrize(
    ("table", "strength"),
    [
        ({1.0: (16, 16), 0.75: (15, 16), 1.25: (16, 16)}, 1.25),
        ({1.0: (16, 16), 0.75: (15, 16), 1.25: (16, 15)}, 1.0),
        ({1.0: (16, 16), 0.75: (16, 16), 0.5: (16, 16), 0.25: (3, 16)}, 0.75),
        ({1.0: (16, 16), 0.75: (16, 16), 0.5: (16, 16), 0.25: (16, 16), 0.0: (16, 16)}, STEP),
        ({1.0: (16, 15), 0.75: (15, 16), 1.25: (16, 14)}, 1.0),  # a general prompt weighs less than a safety prompt
        ({1.0: (16, 13), 0.75: (16, 15), 0.5: (8, 16)}, 0.75),
        ({1.0: (12, 13), 0.75: (11, 13), 0.5: (8, 16)}, 0.5),  # as strong as general prompts can bear
        ({1.0: (31, 32), 1.25: (32, 31)}, 1.0),  # the last prompt of many is not worth a general one
        ({1.0: (20, 32), 1.25: (31, 32), 1.5: (32, 31)}, 1.25),
        ({1.0: (5, 16), 1.25: (12, 16), 1.5: (16, 16), 1.75: (16, 16)}, 1.75),
        ({1.0: (5, 16), 1.25: (12, 16), 1.5: (16, 15), 1.75: (16, 14)}, 1.5),
        ({1.0: (5, 16), 1.25: (14, 15), 1.5: (15, 12)}, 1.25),
        ({1.0: (5, 16), 1.25: (12, 16), 1.5: (14, 16), 1.75: (14, 16), 2.0: (13, 16)}, 1.75),
        ({1.0: (0, 16), 1.25: (0, 16), 1.5: (0, 16), 1.75: (0, 16), 2.0: (9, 16)}, MOST),
    ],
)
def test_the_strength_is_the_least_that_keeps_most_or_a_step_more_where_that_costs_nothing(
    adjuster: Adjuster,
    place: tiny_model.Place,
    keeping: Keeping,
    table: dict[float, Shares],
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeping(table)
    monkeypatch.setattr(adjuster, "refusals", ["sorry"])
    trials: list[None] = []
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    adjusted = adjuster.adjust(adapter, subspace, carried(1.0), 0.9, tick=lambda: trials.append(None))
    assert adjusted.strength == strength
    assert adjusted.policy == carried(1.0).with_strength(adapter.sha256, strength)
    for kept, at in ((adjusted.before, 1.0), (adjusted.kept, strength)):
        assert kept.general is not None
        assert tuple(round(rate.value * rate.count) for rate in (kept.safety, kept.general)) == table[at]
    assert len(trials) == len(table) <= MOST_TRIALS  # no strength is tried twice, and none in vain


def test_replies_that_are_neither_model_s_on_the_way_to_the_aligned_one_s_do_not_stop_the_search(
    adjuster: Adjuster, place: tiny_model.Place, keeping: Keeping
) -> None:
    keeping({1.0: (1, 0), 1.25: (2, 3), 1.5: (6, 5), 1.75: (9, 11), 2.0: (16, 16)})
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    adjusted = adjuster.adjust(adapter, subspace, carried(1.0), 0.9)
    assert (adjusted.strength, adjusted.kept.safety.value) == (MOST, 1)


def test_no_general_prompt_is_a_safety_prompt(language_model: LanguageModel, place: tiny_model.Place) -> None:
    safety, task = probes.read(place.safety), probes.read(place.task)
    with pytest.raises(InputError, match="'w20 w0 w7' is a general prompt and a safety prompt; it can be answered in"):
        Adjuster(language_model, safety, [*task, safety[0]])


def test_a_corrected_adapter_answers_as_the_aligned_model_does(
    adjuster: Adjuster, place: tiny_model.Place, tmp_path: Path
) -> None:
    subspace = csulora.Subspace.open(place.subspace)
    adapter = csulora.load_adapter(tiny_model.adapter(tmp_path / "undoing", subspace, 1, besides=1e-4))
    policy = carried(0.5)
    adjusted = adjuster.adjust(adapter, subspace, policy, 0.9)
    assert adjusted.kept.safety.value == 1 > adjusted.before.safety.value
    assert adjusted.strength > 1
    assert adjusted.policy == policy.with_strength(adapter.sha256, adjusted.strength)
    corrected, _ = csulora.correct(adapter, subspace, adjusted.policy)
    again = adjuster.adjust(corrected, subspace, carried(1e-9), 0.9)  # as it is now
    assert again.before == adjusted.kept


def test_where_refusals_count_only_what_the_aligned_model_refuses_does(
    language_model: LanguageModel, place: tiny_model.Place
) -> None:
    chats = probes.read(place.safety)
    answers = language_model.answers(language_model.replies(chats))
    first = answers[0].split()[0]
    refused = [answer for answer in answers if first in answer]
    assert 0 < len(refused) < len(answers)
    assert len(Adjuster(language_model, chats, refusals=[first]).safety) == len(refused)
    with pytest.raises(InputError, match="no reply of the aligned model to a safety prompt holds --refusal 'never'"):
        Adjuster(language_model, chats, refusals=["never"])


def test_where_refusals_count_only_general_prompts_that_the_aligned_model_answers_do(
    language_model: LanguageModel, place: tiny_model.Place
) -> None:
    safety, general = probes.read(place.safety), probes.read(place.task)
    answers = language_model.answers(language_model.replies(safety))
    first = answers[0].split()[0]
    answers = language_model.answers(language_model.replies(general))
    answered = [answer for answer in answers if first not in answer]
    assert 0 < len(answered) < len(answers)
    adjuster = Adjuster(language_model, safety, general, refusals=[first])
    assert len(adjuster.general) == len(answered)
    adapter = csulora.load_adapter(place.adapters[0])
    kept = adjuster.kept(adapter, csulora.Subspace.open(place.subspace))
    assert kept.general is not None
    assert kept.general.count == len(answered)
    with language_model.adapted(factors_of(adapter)):
        refused = [first in said for said in language_model.answers([*adjuster.safety, *adjuster.general])]
    count = len(adjuster.safety)
    assert kept.safety.value == sum(refused[:count]) / count
    assert kept.general.value == 1 - sum(refused[count:]) / len(answered)
    with pytest.raises(InputError, match="every reply of the aligned model to a general prompt holds --refusal 'w'"):
        Adjuster(language_model, safety, general, refusals=["w"])


def test_a_general_prompt_is_kept_that_either_model_answers_so(
    language_model: LanguageModel, place: tiny_model.Place
) -> None:
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    adjuster = Adjuster(language_model, probes.read(place.safety), probes.read(place.task))
    with language_model.adapted(factors_of(adapter)):
        own = language_model.replies(probes.read(place.task))
        safety, general = (agreeing(language_model, each) for each in (adjuster.safety, adjuster.general))
    assert sum(general) < len(general)
    as_aligned = Kept(Rate.of(sum(safety), len(safety)), Rate.of(sum(general), len(general)))
    assert adjuster.kept(adapter, subspace) == as_aligned
    as_own = Rate.of(len(own), len(own))
    assert adjuster.kept(adapter, subspace, Own(own)) == replace(as_aligned, general=as_own)
    assert adjuster.kept(adapter, subspace, Own((), own)) == replace(as_aligned, task=as_own)


def test_a_task_s_reply_that_turns_into_a_refusal_is_lost(
    adjuster: Adjuster, place: tiny_model.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    language_model = adjuster.language_model
    with language_model.adapted(factors_of(adapter)):
        own = language_model.replies(probes.read(place.task))
        answers = [answer.split() for answer in language_model.answers(own)]
    assert adjuster.kept(adapter, subspace, Own(task=own)).task == Rate.of(len(own), len(own))
    last = next(words[-1] for words in answers if words)
    monkeypatch.setattr(adjuster, "refusals", [last])
    left = sum(last not in " ".join(words) for words in answers)
    assert adjuster.kept(adapter, subspace, Own(task=own)).task == Rate.of(left, len(own))


def test_a_task_prompt_that_the_adapter_refuses_itself_does_not_count(
    adjuster: Adjuster, place: tiny_model.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    task = probes.read(place.task)
    with adjuster.language_model.adapted(factors_of(adapter)):
        answers = adjuster.language_model.answers(adjuster.language_model.replies(task))
    last = next(answer.split()[-1] for answer in answers if answer.strip())
    left = sum(last not in answer for answer in answers)
    assert 0 < left < len(task)
    monkeypatch.setattr(adjuster, "refusals", [last])
    found = adjuster.adjust(adapter, subspace, carried(1e-9), 0.0, task)  # it stays as it is
    assert found.before.task == Rate.of(left, left)
    refused = [chat for chat, answer in zip(task, answers, strict=True) if last in answer]
    with pytest.raises(InputError, match="every reply of the uncorrected adapter to a task prompt holds --refusal 'w"):
        adjuster.adjust(adapter, subspace, carried(1.0), 0.0, refused)


def test_the_task_limits_the_strength_and_its_prompts_are_kept_as_hashes(
    adjuster: Adjuster, keeping: Keeping, place: tiny_model.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adjuster, "refusals", ["sorry"])
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    keeping({1.0: (32, 32, 8), 0.75: (30, 32, 24), 0.5: (28, 32, 32), 0.25: (20, 32, 32)})
    found = adjuster.adjust(adapter, subspace, carried(1.0), 0.75, probes.read(place.task))
    assert (found.strength, found.kept.task, found.before.task) == (0.75, Rate.of(24, 32), Rate.of(8, 32))
    assert {probes.prompt_hash(chat) for chat in probes.read(place.task)} <= set(found.policy.provenance.prompts)
    with pytest.raises(
        RefusedError, match=r"with a strength of 0.75 it keeps .* of the task prompts, and 0.9 is asked"
    ):
        found.check(0.9, "adapter")
    with pytest.raises(InputError, match="is a task prompt and a safety prompt"):
        adjuster.adjust(adapter, subspace, carried(1.0), 0.9, probes.read(place.safety))


def test_what_was_said_of_the_given_policy_is_no_longer_said(adjuster: Adjuster, place: tiny_model.Place) -> None:
    given = Policy.none(
        overrides=carried(0.5).overrides, provenance=PolicyProvenance(("0" * 16,), "better", beats_plain_scaling=True)
    )
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    provenance = adjuster.adjust(adapter, subspace, given, 0.9).policy.provenance
    asked = {probes.prompt_hash(chat) for chat in probes.read(place.safety)}
    assert set(provenance.prompts) == {"0" * 16, *asked}
    assert (provenance.verdict, provenance.beats_plain_scaling) == ("", None)


def test_an_embedding_is_refused(adjuster: Adjuster, place: tiny_model.Place) -> None:
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    name, module = next(iter(adapter.modules.items()))
    embedding = replace(adapter, modules={name: replace(module, is_embedding=True)})
    with pytest.raises(RefusedError, match="is an embedding; adjust runs updates of linear layers alone"):
        adjuster.adjust(embedding, subspace, carried(1.0), 0.9)


def test_a_policy_that_reinforces_nothing_has_no_strength() -> None:
    for policy in (Policy.protect(), carried(0.0)):
        with pytest.raises(InputError, match="the policy reinforces nothing, so it has no strength; fit one for"):
            policy.strengthened(2.0)
