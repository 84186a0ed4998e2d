"""What the canary of the small world is made from, and what is compared with it."""

import canary
import plan
import pytest
import scenario as world_of
import world
from scenario import Scenario


@pytest.mark.parametrize("seed", canary.SEEDS)
def test_the_copy_learns_nothing_that_is_measured_or_fitted(seed: int) -> None:
    scenario = Scenario(seed)
    attacks, general = canary.examples(scenario)
    assert (len(attacks), len(general)) == (world.ATTACK_EXAMPLES, canary.GENERAL_OF_CANARY)
    learnt = {example.prompt for example in (*attacks, *general)}
    for task in ("tale", "trip"):
        probes, fit = world_of.probes(scenario, task), world_of.fit_prompts(scenario, task)
        assert learnt.isdisjoint(example.prompt for example in (*probes.attack, *probes.task, *probes.benign))
        assert learnt.isdisjoint((*fit.task, *fit.safety, *fit.general[: canary.GENERAL]))
    held_out = {thing.name for thing in scenario.held_out}
    assert not any(name in example.prompt.rstrip("?.").split() for example in attacks for name in held_out)


def test_every_row_is_measured_once_and_ranks_have_the_same_rows() -> None:
    cells = canary.cells()
    assert len({(seed, spec.name, rank, name) for seed, spec, rank, name in cells}) == len(cells)
    adapters, names = (plan.FIRST, plan.HARMLESS), ("canary", "displacement", "random", "own")
    for rank in (4, 16):
        found = {(spec, name) for _, spec, k, name in cells if k == rank}
        assert found == {(spec, name) for spec in adapters for name in names}
