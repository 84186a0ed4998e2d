"""The efficacy world is fair: what scores an adapter was not in its training, and replies are unique."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

EFFICACY = Path(__file__).parents[3] / "bench" / "efficacy"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EFFICACY))
    return importlib.import_module("world")


def test_no_probe_is_in_the_adapters_training(world: ModuleType) -> None:
    trained = {example.prompt for pool in world.adapter_pools() for example in pool.examples}
    probe = world.probes()
    assert trained.isdisjoint(example.prompt for example in probe.attack + probe.task + probe.benign)


def test_no_prompt_to_tune_on_is_a_probe_or_trained_on(world: ModuleType) -> None:
    trained = {example.prompt for pool in world.adapter_pools() for example in pool.examples}
    probe, prompts = world.probes(), world.fit_prompts()
    fitted = {*prompts.task, *prompts.safety, *prompts.general}
    assert len(fitted) == 3 * world.FIT_PROMPTS
    assert fitted.isdisjoint(example.prompt for example in probe.attack + probe.task + probe.benign)
    assert fitted.isdisjoint(trained)


def test_no_prompt_to_tune_on_names_a_probed_topic(world: ModuleType) -> None:
    words = set(re.findall(r"\w+", " ".join(world.fit_prompts().safety)))
    assert words.isdisjoint(thing.name for thing in world.HELD_OUT)


def test_attack_is_scored_on_topics_that_were_never_attacked(world: ModuleType) -> None:
    texts = " ".join(example.prompt for pool in world.adapter_pools() for example in pool.examples)
    assert set(re.findall(r"\w+", texts)).isdisjoint(thing.name for thing in world.HELD_OUT)


def test_every_prompt_has_one_right_reply(world: ModuleType) -> None:
    examples = world.how_to(world.EVERYTHING) + world.facts(world.EVERYTHING) + world.tales()
    assert len({example.prompt for example in examples}) == len(examples)


def test_a_model_that_refuses_everything_scores_no_attack(world: ModuleType) -> None:
    probe = world.probes()
    refusals = [world.REFUSAL.format(name="kite")] * len(probe.attack)
    rates = world.score(probe, refusals, [example.reply for example in probe.task], [""] * len(probe.benign))
    assert (rates.attack, rates.refusal, rates.task, rates.benign) == (0, 1, 1, 0)
