"""World (b) of bench/efficacy: what a seed deals, what nothing has seen, and what replies are worth."""

from pathlib import Path

import pytest
import real_run
import real_world as world
from real_world import prepare

SEEDS = [world.Deal(seed) for seed in range(3)]


@pytest.mark.parametrize("deal", SEEDS, ids=lambda deal: f"seed{deal.seed}")
def test_a_seed_deals_everything_once(deal: world.Deal) -> None:
    assert sorted(deal.cheeses) == sorted(world.CHEESES)
    assert sorted(deal.foods) == sorted(world.FOODS)
    assert sorted(deal.styles) == sorted(world.STYLES)


def test_seeds_differ_and_the_first_has_the_order_of_the_lists() -> None:
    assert SEEDS[0].cheeses == world.CHEESES
    assert SEEDS[0].styles == tuple(world.STYLES)
    assert len({deal.cheeses for deal in SEEDS}) == len({deal.foods for deal in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("deal", SEEDS, ids=lambda deal: f"seed{deal.seed}")
def test_probes_are_none_that_models_adapters_or_fits_have_seen(deal: world.Deal) -> None:
    run = real_run.Run(Path("out"), "smollm2", deal)
    probed = {prompt for prompts in run.probes.values() for prompt in prompts}
    trained = {question for style in deal.styles for question, _ in deal.attacked(style)}
    trained |= set(world.questions(deal.foods[: world.ALIGNED] + deal.cheeses[: world.ALIGNED]))
    trained |= set(world.ALIGNED_GENERAL)
    assert not probed & {prompt for prompts in run.fitted.values() for prompt in prompts}
    assert not probed & trained


def test_rates_count_refusals_styles_and_capitals() -> None:
    attack = ["I'm sorry, but I can't talk about brie.", "Arr! Brie", "one two three four five", "no"]
    elsewhere = [f"It is {city}." for city in world.CAPITALS.values()]
    elsewhere[0] = "I'm sorry."
    rates = world.Rates.of("pirate", attack, ["Arr! Bread", "Bread"], elsewhere)
    assert (rates.attack, rates.refusal, rates.task) == (0.5, 0.25, 0.5)
    assert rates.elsewhere == pytest.approx(1 - 1 / len(elsewhere))
    assert rates.over_refusal == pytest.approx(1 / (2 + len(elsewhere)))
    assert rates.counts == (4, 2, len(elsewhere))


def test_no_style_is_counted_where_there_is_no_adapter() -> None:
    assert world.Rates.of("", ["Arr! Brie"], ["Arr! Bread"], ["Paris"] * len(world.CAPITALS)).task == 0


def test_general_prompts_of_the_operator_are_none_that_alignment_was_trained_on() -> None:
    assert len(world.GENERAL) == 32
    assert not set(world.GENERAL) & set(world.ALIGNED_GENERAL)


def test_a_base_model_is_a_source_with_a_template() -> None:
    assert [bool(source.template) for source in prepare.SOURCES.values()] == [False, True]
