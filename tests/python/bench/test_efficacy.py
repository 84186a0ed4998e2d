"""bench/efficacy's grid: what it deals out, how it measures, and what its tables say of it."""

import itertools
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import experiments
import lab
import measure
import plan
import policies
import pytest
import report
import scenario
import torch
import train
import ways
import world
from scenario import TASKS, Scenario
from transformers import AutoTokenizer, LlamaForCausalLM

import factories
from csulora import Policy
from csulora.native import _core
from csulora.tuning.gains import PerModule
from csulora.tuning.update import Update

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = [Scenario(seed, formats) for seed in (0, 1) for formats in (False, True)]


@pytest.mark.parametrize("dealt", SEEDS, ids=lambda dealt: dealt.name)
def test_a_scenario_deals_every_thing_once_and_probes_with_what_nobody_trained_on(dealt: Scenario) -> None:
    things = [*dealt.attacked, *dealt.held_out, *dealt.benign]
    assert sorted(thing.name for thing in things) == sorted(thing.name for thing in world.EVERYTHING)
    for task in TASKS:
        probes, prompts = scenario.probes(dealt, task), scenario.fit_prompts(dealt, task)
        pools = dealt.adapter_pools(scenario.Adapter(task, 0.15))
        trained = {example.prompt for pool in pools for example in pool.examples}
        probed = {example.prompt for example in [*probes.attack, *probes.task]}
        fitted = {*prompts.task, *prompts.safety, *prompts.general}
        assert len(fitted) == 96
        assert not (trained | fitted) & probed
        assert not fitted & {example.prompt for example in probes.benign}
        assert not trained & fitted
        assert sum(pool.share for pool in pools) == pytest.approx(1)
        assert len(probes.benign) == 100


@pytest.mark.parametrize("seed", range(3))
def test_general_prompts_come_in_every_wording(seed: int) -> None:
    prompts = scenario.fit_prompts(Scenario(seed), "tale", 18).general
    wordings = [text.partition("{")[0] for text in (*world.HOW_TO_QUESTIONS, *(fact.prompt for fact in world.FACTS))]
    for turn in prompts[:9], prompts[9:]:
        assert sorted(wording for prompt in turn for wording in wordings if prompt.startswith(wording)) == sorted(
            wordings
        )
    assert len(set(prompts)) == 18


def test_no_word_of_any_scenario_is_unknown() -> None:
    words = lab.tokenizer()
    for dealt, task in itertools.product(SEEDS, TASKS):
        for example in [*dealt.task(task)[:40], *dealt.general()[:40], *dealt.attacks()[:40]]:
            assert words.unk_token_id not in words(f"{example.prompt} {example.reply}").input_ids


def test_what_is_carried_over_is_calibrated_on_few_and_tried_on_many_others() -> None:
    assert len(plan.CALIBRATION) <= 3
    assert len(plan.UNSEEN) >= 12
    assert not {adapter.task for adapter in plan.CALIBRATION} & {adapter.task for adapter in plan.UNSEEN}
    assert {adapter.attack for adapter in plan.UNSEEN} >= {0.0, 0.01, 0.05, 0.2, 1.0}
    assert {adapter.rank for adapter in plan.UNSEEN} >= {4, 16, 64}


@pytest.mark.parametrize("side", ["base", "aligned"])
def test_rates_without_decoding_are_those_of_decoded_replies(side: str) -> None:
    words = AutoTokenizer.from_pretrained(train.FIXTURE / side)
    model, aligned = (
        LlamaForCausalLM.from_pretrained(train.FIXTURE / of, dtype=torch.float32) for of in (side, "aligned")
    )
    every = world.probes()
    few = world.Probes(every.attack[:8], every.task[:8], every.benign[-8:])
    kinds = (few.attack, few.task, few.benign)
    wanted = world.score(few, *(measure.decode(model, words, [each.prompt for each in kind]) for kind in kinds))
    found = measure.Examiner(aligned, words, measure.Probes(*kinds)).measure(model)
    assert wanted.attack == (side == "base")
    assert (found.attack, found.refusal, found.task, found.benign) == tuple(asdict(wanted).values())
    assert found.counts == (8, 8, 8)


def test_picks_count_rows_whose_wanted_tokens_are_all_picked() -> None:
    ignored = train.IGNORED
    picks = measure.Picks(torch.tensor([[5, 1, 2], [5, 1, 9]]), torch.tensor([[ignored, 1, 2], [ignored, 1, 2]]))
    assert picks.exact == 0.5
    assert picks.begins_with(1) == 1
    assert picks.begins_with(5) == 0


def test_fitted_penalties_are_the_cores() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    update, way = Update.of(adapter, subspace), ways.Penalties(len(factories.SHAPES))
    parameters = torch.randn(way.start().shape, generator=factories.generator(0))
    gains = way(parameters, torch.arange(len(update.targets)), update.energies)
    tasks = [
        _core.CorrectionTask(
            _core.LoraFactors(adapter.modules[name].b, adapter.modules[name].a, adapter.modules[name].scale),
            core,
            _core.Penalties(*penalties),
        )
        for name, core, penalties in zip(
            update.targets, subspace.to_core(update.targets.values()), way.penalties(parameters).tolist(), strict=True
        )
    ]
    for result, row in zip(_core.correct(tasks), gains.tolist(), strict=True):
        found = result.gains
        assert row == pytest.approx([found.aligned, found.left, found.right, found.off], rel=1e-4)


def test_ways_start_near_keeping_everything() -> None:
    modules, index, energies = list(factories.SHAPES), torch.arange(3), torch.full((3, 4), 0.25)
    for way in (ways.Global(), PerModule(3), ways.Smooth(modules)):
        gains = way(way.start(), index, energies)
        assert gains.shape == (3, 4)
        assert float(gains.min()) > 0.8


def test_ways_correct_updates() -> None:
    adapter, modules = factories.adapter(), list(factories.SHAPES)
    update, index = Update.of(adapter, factories.subspace()), torch.arange(len(modules))
    for way in (ways.Global(), ways.Smooth(modules), ways.Penalties(len(modules))):
        for name, (b, a) in way.correct(way.start(), index, update).items():
            module = adapter.modules[name]
            whole = module.scale * module.b @ module.a
            assert float((b @ a - whole).norm()) < 0.5 * float(whole.norm())


def test_scaling_to_the_relative_change_of_another_policy_changes_as_much() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    other = policies.apply("protect", "l=inf", adapter, subspace, Policy.protect(math.inf))
    scaled = policies.scaled_as_much(adapter, subspace, other)
    assert scaled.control
    assert scaled.relative_change == pytest.approx(other.relative_change, rel=1e-3)
    everything = policies.scaled_as_much(adapter, subspace, replace(other, relative_change=1.5))
    assert everything.relative_change == pytest.approx(1)


def test_every_grid_has_each_family_and_its_controls() -> None:
    layers = {f"model.layers.{layer}.self_attn.q_proj": (40, 40) for layer in range(2)}
    adapter, subspace = factories.adapter(layers), factories.subspace(layers, rank=16)
    for grid in (policies.whole_grid, policies.short_grid):
        done = list(grid(adapter, subspace))
        families = {"none", "csulora", "project", "protect", "aligned-only", "scaling"}
        controls = {"random subspace", "other layer", "safe-lora"}
        assert {each.family for each in done} - {"mixed"} == families | controls
        assert {each.family for each in done if each.control} == controls | {"scaling"}
        assert len({(each.family, each.policy) for each in done}) == len(done)


def test_committed_results_have_the_cells_that_the_grid_would_run() -> None:
    for kind, planned in experiments.KINDS.items():
        found = [(cell["scenario"], cell["adapter"]) for cell in report.cells(report.RESULTS, kind)]
        names = [(Scenario(**dealt).name, scenario.Adapter(**spec).name) for dealt, spec in found]
        assert names == [(cell.scenario.name, cell.adapter.name) for cell in planned], kind


def point(family: str, attack: float, task: float) -> dict[str, object]:
    rates = {"refusal": 0.0, "benign": 1.0, "over_refusal": 0.0, "agreement": 1.0, "perplexity": 1.0}
    counts = [100, 100, 100]
    return {
        "family": family,
        "policy": "p",
        "relative_change": 0.5,
        "attack": attack,
        "task": task,
        "counts": counts,
    } | rates


def test_the_area_under_a_frontier_is_worked_by_hand() -> None:
    cell = {"points": [point("none", 1.0, 0.8), point("a", 0.5, 0.8), point("a", 0.0, 0.4)]}
    assert report.area(cell, "a") == pytest.approx(0.5 * 1.0 + 0.5 * 0.5, abs=0.01)
    assert report.area(cell, "none") == pytest.approx(0, abs=0.01)


def test_tables_and_plots_say_what_the_cells_hold() -> None:
    described = {"scenario": asdict(Scenario(0)), "adapter": asdict(plan.FIRST)}
    cell = described | {"points": [point("none", 1.0, 0.8), point("tuned", 0.25, 0.6)]}
    assert "| tuned p | 0.50 | 0.25 (0.1" in report.rates_table([cell])
    assert "| 1.00 / 0.80 / 1.00 | 0.25 / 0.75 / 1.00 |" in report.seeds_table([cell], ["tuned"])
    assert "tuned p: 0.25 / 0.60" in report.plot([cell], ["tuned"], "title")
    pure = described | {"adapter": asdict(plan.FIRST) | {"attack": 1.0}}
    pure["points"] = [point("none", 1.0, 0.0), point("tuned", 0.9, 0.0)]
    assert "| tuned p | 0.25 | 0.25 | 0.75 | 0.75 | 0.90 |" in report.carry_table([cell, pure])


def test_a_variant_is_told_by_its_median_and_worst_and_by_what_is_not_refused() -> None:
    def adapter(undo: float, attack: float, **adjusted: list[float]) -> dict[str, object]:
        rates = {"task": 0.8, "benign": 0.5}
        return {"raw": rates | {"undo": undo}, "point": {"attack": attack, "task": 0.4, "benign": 0.5}} | adjusted

    def told(*adapters: dict[str, object]) -> str:
        return report.variants_table([{"seed": 5, "variant": "v", "undo_limit": 0.1, "adapters": adapters}])

    figures = "| 5 | v | 0.50 / 0.75 | 0.50 / 0.50 | 1.00 / 1.00 | 1 of 2 | 0.25 / 0.50 / 1.00 |"
    assert figures in told(adapter(0.1, 0.25), adapter(0.2, 0.75))
    assert figures in told(adapter(0.2, 0.25, kept=[0.95, 0.95]), adapter(0.1, 0.75, kept=[1.0, 0.85]))


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    """But for the intervals, whose samples another release of numpy may draw differently."""
    readme, of_results = (
        re.sub(r" \([\d.]+ to [\d.]+\)", "", text)
        for text in ((Path(report.__file__).parent / "README.md").read_text(), "\n".join(report.tables(report.RESULTS)))
    )
    assert readme.endswith(of_results)
