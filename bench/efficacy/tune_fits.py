"""What `csulora tune` fits on the grid's adapters: gains of single directions, and the controls of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import measure
import policies
from policies import Corrected
from scenario import Adapter
from subject import Bench, Record, Subject, chats

import csulora
from csulora import Policy, controls
from csulora.tuning.experiment import Experiment
from csulora.tuning.families import CONTROLS
from csulora.tuning.frontier import Point
from csulora.tuning.options import Options
from csulora.tuning.recommendation import EVERYWHERE, TUNED
from csulora.tuning.request import Request

RANK = 32  # directions per module
DEFAULTS = Options()
GENERAL = 16  # general prompts, where there are any
CONTROL_NAMES = tuple(family.name for family in CONTROLS)
# What can be fitted on some adapters for others: own subspaces are each adapter's.
SHAREABLE = (TUNED, EVERYWHERE, *(name for name in CONTROL_NAMES if name != "tuned own subspace"))


@dataclass(frozen=True)
class Prompts:
    """What prompts a fit is given besides those of the task and of safety.

    Attributes:
        diverse: whether a quarter of the task prompts are general ones.
        general: whether general prompts are given as such.
    """

    diverse: bool = False
    general: bool = False


def experiment(
    bench: Bench,
    specs: Sequence[Adapter],
    subspace: csulora.Subspace,
    *,
    for_others: bool,
    prompts: Prompts = Prompts(),
    options: Options = DEFAULTS,
) -> Experiment:
    """What `csulora tune` does on some adapters, and has finished of it."""
    given = [bench.prompts(spec) for spec in specs]
    request = Request(
        str(bench.lab.aligned()),
        [bench.subject(spec).adapter for spec in specs],
        subspace,
        task=[chats(each.diverse if prompts.diverse else each.task) for each in given],
        safety=chats(given[0].safety),
        general=chats(given[0].general[:GENERAL]) if prompts.general else (),
        for_others=for_others,
        longest_reply=measure.MAX_REPLY,
        options=options,
    )
    names = [spec.name for spec in specs] + ["others"] * for_others + ["general"] * prompts.general
    names += ["diverse"] * prompts.diverse + ["reworded"] * bench.scenario.reworded
    output = bench.lab.directory / f"tune-{'-'.join(names)}.toml"
    return Experiment(request, output, language_model=bench.language_model)


def alone(subject: Subject, prompts: Prompts) -> tuple[list[Corrected], Record]:
    """One adapter as `csulora tune` fits it, with every weight that it tries, and what `tune` itself reports.

    The controls are fitted as well where no general prompts are given.
    """
    known = controls.truncated(subject.bench.subspace, RANK)
    tuning = experiment(subject.bench, [subject.spec], known, for_others=False, prompts=prompts)
    best = tuning.best_weight

    def corrected(family: str, shown: str, name: str, weight: float, *, final: bool = False) -> Corrected:
        subspace = tuning.subspace(family, 0, [0], final=final)
        policy = tuning.policy(family, [0], weight, final=final)
        return policies.apply(shown, name, subject.adapter, subspace, policy, control=family in CONTROL_NAMES)

    chosen = corrected(TUNED, TUNED, f"k={RANK}", best, final=True)
    done = [
        policies.apply("none", "uncorrected", subject.adapter, known, Policy.none()),
        *(corrected(TUNED, "tried", f"task weight {weight:g}", weight) for _, weight in tuning.tuned),
        chosen,
        *(corrected(family, family, f"k={RANK}", best) for family in CONTROL_NAMES if not prompts.general),
        policies.scaled_as_much(subject.adapter, known, chosen),
    ]
    return done, reported(next(point for point in tuning.run().frontier.points if point.family == TUNED))


def reported(point: Point) -> Record:
    """What `csulora tune` reports of a policy, on the test split; the validation split chose it."""
    general = point.general.value if point.general else None
    return {"safety": point.safety.value, "task": point.task.value, "general": general, "choice": point.choice.value}
