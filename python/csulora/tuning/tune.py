"""From a model, its adapters and kinds of prompt to a policy, and to the frontier that shows what it is worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TypeVar

import torch
from torch import Tensor

import csulora
from csulora.adapters.lora import Adapter
from csulora.errors import InputError
from csulora.extraction.model_pair import Progress
from csulora.policy.policy import Policy
from csulora.subspace.input_filter import InputFilter
from csulora.subspace.subspace import Subspace
from csulora.tuning import sweep
from csulora.tuning.controls import least_ranks, own_subspaces, random_subspaces
from csulora.tuning.fit import Case, Replies, fit
from csulora.tuning.frontier import Frontier, Point, Rate, Refusals, frontier_path
from csulora.tuning.gains import PerDirection, PerModule, Reinforcing
from csulora.tuning.inputs import input_filter_between, safety_inputs, task_inputs
from csulora.tuning.language_model import LanguageModel, Reply, agreeing
from csulora.tuning.probes import Chat
from csulora.tuning.recommendation import EVERYWHERE, candidates, preference, recommend
from csulora.tuning.request import Request
from csulora.tuning.stages import Stages
from csulora.tuning.sweep import Candidate
from csulora.tuning.update import Update, factors_of

Item = TypeVar("Item")

VALIDATION_STRIDE = 4  # every fourth prompt is in the validation split

CANDIDATES = ("tuned", EVERYWHERE)  # for adapters to come; for one that is there, the first
CONTROLS = ("tuned scaling", "tuned random subspace", "tuned own subspace")


def tune(request: Request, output: Path, progress: Progress | None = None) -> Frontier:
    """Fit a policy and write it to ``output``, a TOML file, with its frontier beside it.

    Everything that the frontier shows is measured on the validation split: it says when a fit ends and which is taken,
    and is not fitted to otherwise. With several adapters, fitted policies are moreover measured on each
    adapter after a fit on the others. A policy for adapters to come reinforces some of what alignment did. It is
    filtered unless the score of a fit without input filters lies above the 95 % interval of those with: the subspace
    file to use it with, the given one with input filters, is written to `subspace_path`. If ``output`` has an
    unfinished run of the same request beside it, that is continued.

    Raises:
        InputError, RefusedError: model, adapters, subspace file and prompts do not fit each other.
    """
    run = Run(request, output, progress)
    frontier, policy, subspace = run.frontier()
    if policy.filtered:
        subspace.save(subspace_path(output))
    policy.save(output)
    frontier.save(frontier_path(output))
    run.stages.remove()
    return frontier


def subspace_path(policy: Path) -> Path:
    """Where the subspace file of a filtered policy is."""
    return policy.with_name(f"{policy.stem}.subspace.safetensors")


class Run:
    """One run of `tune`, whose finished fits and figures lie beside ``output``."""

    def __init__(self, request: Request, output: Path, progress: Progress | None) -> None:
        """Continue what an unfinished run of the same request left."""
        self.request, self.progress = request, progress
        self.stages = Stages(output, request.identity)
        self.subspace, self.adapters = request.subspace, request.adapters
        self.rest: dict[str, Any] = {"uncovered": request.uncovered}
        updates = [Update.of(adapter, self.subspace, request.uncovered) for adapter in self.adapters]
        self.targets = [update.targets for update in updates]
        every = {target for targets in self.targets for target in targets.values()}
        # A policy's patterns match ends of names too, and the first counts: those that end others come after them.
        self.modules = sorted(every, key=lambda name: (-name.count("."), name))
        self.own_ranks = least_ranks(self.adapters, self.targets)
        self.done, self.total = 0, self._total()
        self.fitted: set[str] = set()

    def _total(self) -> int:
        adapters, weights = len(self.adapters), len(self.request.weights)
        candidates = weights * len(self._candidates)
        kinds = candidates + len(CONTROLS)
        measured = adapters * (len(self._plain()) + kinds)
        each_left_out = adapters * kinds * self._steps(max(1, adapters - 1))
        together = candidates * self._steps(adapters) if adapters > 1 else 0
        return measured + each_left_out + together

    @property
    def _candidates(self) -> tuple[str, ...]:
        """The families whose policies may be recommended."""
        if not self.request.is_for_others:
            return CANDIDATES[:1]
        return CANDIDATES if self.request.input_filters else (EVERYWHERE,)

    def _steps(self, adapters: int) -> int:
        """Most steps of a fit on so many adapters."""
        return self.request.options.steps * adapters

    def _plain(self) -> list[Candidate]:
        return [*sweep.presets(self.rest), *sweep.scalings(self.rest)]

    def _tick(self, what: str) -> None:
        if self.progress:
            self.progress(what, self.done, self.total)
        self.done += 1

    @cached_property
    def language_model(self) -> LanguageModel:
        """The aligned model."""
        return LanguageModel.open(self.request.model, self.request.device, self.request.longest_reply)

    @cached_property
    def replies(self) -> list[Replies]:
        """Per adapter, the aligned model's replies to safety prompts, and its own, uncorrected, to the others."""
        safety = self.language_model.replies(self.request.safety)
        every = zip(self.adapters, self.request.task, strict=True)
        return [
            Replies(safety, *(self._own_replies(adapter, chats) for chats in (task, self.request.general)))
            for adapter, task in every
        ]

    @cached_property
    def general(self) -> list[Reply]:
        """The aligned model's replies to general prompts."""
        return self.language_model.replies(self.request.general)

    @cached_property
    def validation_prompts(self) -> frozenset[tuple[int, ...]]:
        """Tokens of all prompts in a validation split. A prompt in several files may be in that of one of them."""
        kinds = (kind for replies in self.replies for kind in replies.kinds)
        return frozenset(_prompt(reply) for kind in kinds for reply in selected(kind, validation=True))

    def to_fit(self, replies: Sequence[Reply]) -> list[Reply]:
        """Those of a file's replies that are fitted: a prompt in any validation split is excluded."""
        found = [
            reply for reply in selected(replies, validation=False) if _prompt(reply) not in self.validation_prompts
        ]
        if replies and not found:
            raise InputError(
                "all of a file's prompts are in others' validation splits; give what files share in the same order"
            )
        return found

    def _own_replies(self, adapter: Adapter, chats: Sequence[Chat]) -> list[Reply]:
        with self.language_model.adapted(self._on_device(adapter)):
            return self.language_model.replies(chats)

    def _on_device(self, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
        device = self.language_model.device
        return {name: (b.to(device), a.to(device)) for name, (b, a) in factors_of(adapter).items()}

    def frontier(self) -> tuple[Frontier, Policy, Subspace]:
        """Measure everything; return the frontier, the policy to write, and the subspace file that it is for."""
        points, policies = [], {}
        for candidate in self._plain():
            each = [(number, self.subspace, candidate.policy) for number in range(len(self.adapters))]
            points.append(self._point(candidate.family, candidate.name, candidate.family == "scaling", each))
            policies[candidate.name] = candidate.policy
        points += self.tuned.values()
        points += (self._fitted_point(family, self.best_weight) for family in CONTROLS)
        for (family, weight), point in self.tuned.items():
            policies[point.policy] = self.policy(family, range(len(self.adapters)), weight)
        self._tick("")
        points = sorted(points, key=lambda point: (point.family, point.policy))
        chosen, verdict = recommend(points)
        verdict = "; ".join([verdict, *self._doubts()])
        best = chosen or max((point for point in candidates(points) if point.policy in policies), key=preference)
        policy = policies[best.policy]
        subspace = self.subspace_for("tuned", 0, range(len(self.adapters))) if policy.filtered else self.subspace
        frontier = Frontier(
            subspace_sha256=subspace.sha256,
            adapters=tuple(adapter.path.resolve().name for adapter in self.adapters),
            points=tuple(points),
            recommended=chosen.policy if chosen else None,
            written=best.policy,
            verdict=verdict,
        )
        return frontier, sweep.pinned(policy, subspace.sha256), subspace

    def _doubts(self) -> Iterator[str]:
        """What was not measured, and may be gone without a trace in the figures."""
        if self.request.is_for_others and len(self.adapters) == 1:
            yield "measured on the adapter it was fitted on, not on others"
        if not self.request.general:
            yield "not measured on general prompts"

    @cached_property
    def tuned(self) -> dict[tuple[str, float], Point]:
        """Family and weight of the task prompts -> the point of the candidate that was fitted so."""
        every = itertools.product(self._candidates, self.request.weights)
        return {(family, weight): self._fitted_point(family, weight) for family, weight in every}

    @property
    def best_weight(self) -> float:
        """The weight whose fit keeps most of both on the prompts in the validation split."""
        return max(self.tuned, key=lambda candidate: preference(self.tuned[candidate]))[1]

    def _fitted_point(self, family: str, weight: float) -> Point:
        """A fitted family's point: each adapter after a fit on the others, or the one adapter after a fit on itself."""
        several = len(self.adapters) > 1
        each = []
        for number in range(len(self.adapters)):
            others = [other for other in range(len(self.adapters)) if other != number or not several]
            each.append((number, self.subspace_for(family, number, others), self.policy(family, others, weight)))
        return self._point(family, f"{family} {weight:g}", family in CONTROLS, each)

    def subspace_of(self, family: str, number: int) -> Subspace:
        """What a family is fitted in: the request's subspaces, or a control's."""
        if family == "tuned random subspace":
            return self._random_subspaces
        if family == "tuned own subspace":
            return own_subspaces(self.subspace, self.adapters[number], self.targets[number], self.own_ranks)
        return self.subspace

    def subspace_for(self, family: str, number: int, numbers: Sequence[int]) -> Subspace:
        """What a family's policy, fitted on some adapters, is used with on one: subspaces, with its input filters."""
        subspace = self.subspace_of(family, number)
        return (
            subspace.with_input_filters(self.input_filters(tuple(numbers))) if self._is_filtered(family) else subspace
        )

    def _carries_over(self, family: str) -> bool:
        return isinstance(self._gains(family), Reinforcing)

    def _is_filtered(self, family: str) -> bool:
        return self.request.input_filters and self._carries_over(family) and family != EVERYWHERE

    @cache  # noqa: B019 - a run lives as long as what it has found
    def input_filters(self, numbers: tuple[int, ...]) -> dict[str, InputFilter]:
        """Module in the subspace file -> the inputs that safety prompts bring, and task prompts of some adapters do
        not.

        Nor do general prompts, with these adapters or with none.
        """
        names = {target: name for number in numbers for name, target in self.targets[number].items()}
        safety = safety_inputs(self.language_model, names.values(), self.to_fit(self.replies[0].safety))
        kinds = [[self._task_inputs(number, self.replies[number].task) for number in numbers]]
        if self.request.general:
            without = task_inputs(self.language_model, names.values(), self.to_fit(self.general))
            with_adapters = [self._task_inputs(number, self.replies[number].general) for number in numbers]
            kinds.append([*with_adapters, {target: without[name] for target, name in names.items() if name in without}])
        device = self.language_model.device
        return {
            target: input_filter_between(
                safety[name].to(device),
                [[inputs[target].to(device) for inputs in kind if target in inputs] for kind in kinds],
            ).to(torch.device("cpu"))
            for target, name in names.items()
            if name in safety
        }

    def _task_inputs(self, number: int, replies: Sequence[Reply]) -> dict[str, Tensor]:
        targets, fitted = self.targets[number], self.to_fit(replies)
        with self.language_model.adapted(self._on_device(self.adapters[number])):
            inputs = task_inputs(self.language_model, targets, fitted)
        return {targets[name]: each for name, each in inputs.items()}

    @cached_property
    def _random_subspaces(self) -> Subspace:
        return random_subspaces(self.subspace, self.request.options.seed)

    def policy(self, family: str, numbers: Sequence[int], weight: float) -> Policy:
        """The policy fitted on some adapters, the task prompts weighing so much."""
        stage = f"fit {family} {weight:g} {list(numbers)}"
        before = self.done
        rows = self.stages.finish(stage, lambda: self._fit(family, numbers, weight).tolist())
        if stage not in self.fitted:  # one adapter's fit is asked for twice
            self.fitted.add(stage)
            self.done = before + self._steps(len(numbers))  # also if it ended early, or was there already
        fitted = {target for number in numbers for target in self.targets[number].values()}
        modules = [name for name in self.modules if name in fitted]
        others = len(self.subspace) > len(modules)
        gains = torch.tensor([row for name, row in zip(self.modules, rows, strict=True) if name in fitted])
        if gains.dim() == 3:
            ranks = {name: self.subspace[name].rank for name in modules}
            if family == "tuned own subspace":
                ranks = {name: min(rank, self.own_ranks[name]) for name, rank in ranks.items()}
            rest = self.rest | {
                "reference_energy": self._reference_energy(family, numbers),
                "filtered": self._is_filtered(family),
            }
            return sweep.fitted_along(ranks, gains, others, rest)
        return sweep.fitted(modules, gains, others, self.rest)

    def _fit(self, family: str, numbers: Sequence[int], weight: float) -> Tensor:
        gains = self._gains(family)
        reference_energy = self._reference_energy(family, numbers)
        cases = [self._case(family, number, numbers, reference_energy) for number in numbers]
        options = replace(self.request.options, task_weight=weight, steps=self._steps(len(numbers)))
        parameters = fit(self.language_model, cases, gains, options, partial(self._tick, family))
        if isinstance(gains, PerDirection):
            return gains.gains(parameters).cpu()
        every = torch.arange(len(self.modules), device=self.language_model.device)
        return gains(parameters, every, torch.zeros(len(self.modules), 4, device=self.language_model.device)).cpu()

    def _gains(self, family: str) -> PerDirection | PerModule:
        """What is fitted: what carries over to other adapters if the policy is for them."""
        if family == "tuned scaling":
            return PerModule(len(self.modules), components=1)
        if self.request.is_for_others:
            return Reinforcing(len(self.modules), self.request.options.shared_directions)
        return PerDirection(len(self.modules), self.request.options.directions)

    def _reference_energy(self, family: str, numbers: Sequence[int]) -> float | None:
        """The geometric mean of the energies of a fit's adapters, if their policy is to follow that of others."""
        if not self._carries_over(family):
            return None
        energies = [self._energy(family, number) for number in numbers]
        return geometric_mean(energies) if all(energies) else None

    def _energy(self, family: str, number: int) -> float:
        directions = self.request.options.shared_directions
        stage = f"energy {family} {number}"

        def measure() -> float:
            update = Update.of(self.adapters[number], self.subspace_of(family, number), self.request.uncovered)
            return update.energy_along(directions)

        return float(self.stages.finish(stage, measure))

    def _case(self, family: str, number: int, numbers: Sequence[int], reference_energy: float | None) -> Case:
        subspace = self.subspace_for(family, number, numbers)
        update = Update.of(self.adapters[number], subspace, self.request.uncovered).to(self.language_model.device)
        if not self._is_filtered(family):
            update = replace(update, input_filters={})  # which the subspace file may have from an earlier policy
        if reference_energy is not None:
            update = update.with_penalty_scale(self.request.options.shared_directions, reference_energy)
        index = torch.tensor([self.modules.index(target) for target in update.targets.values()])
        fitted, validation = Replies(*map(self.to_fit, self.replies[number].kinds)), validation_of(self.replies[number])
        return Case(update, index.to(self.language_model.device), fitted, validation)

    def _point(self, family: str, name: str, control: bool, each: Sequence[tuple[int, Subspace, Policy]]) -> Point:
        """A policy, or one for each adapter, on the validation prompts of all adapters together."""
        results = []
        for number, subspace, policy in each:
            stage = f"measure {name} on {number}"
            results.append(self.stages.finish(stage, partial(self._measure, number, subspace, policy)))
            self._tick(name)
        validation = [validation_of(self.replies[number]) for number, _, _ in each]
        safety_count = sum(len(replies.safety) for replies in validation)
        task_count = sum(len(replies.task) for replies in validation)
        general = len(each) * len(selected(self.request.general, validation=True))

        def rate(what: str, count: int) -> Rate:
            return Rate.of(sum(result[what] for result in results), count)

        return Point(
            family,
            name,
            control,
            safety=rate("safety", safety_count),
            task=rate("task", task_count),
            relative_change=math.sqrt(sum(result["relative_change"] ** 2 for result in results) / len(results)),
            refusals=Refusals(rate("refused", safety_count), rate("over-refused", task_count))
            if self.request.refusals
            else None,
            general=rate("general", general) if general else None,
        )

    def _measure(self, number: int, subspace: Subspace, policy: Policy) -> dict[str, float]:
        """What `correct` would write, on an adapter's validation prompts: replies that stay, and |X - dW| / |dW|."""
        fixed, report = csulora.correct(self.adapters[number], subspace, policy)
        validation = validation_of(self.replies[number])
        general_of_aligned = selected(self.general, validation=True)
        found = {"relative_change": report.totals.relative_change}
        with self.language_model.adapted(self._on_device(fixed)):
            for kept, refused, replies in (
                ("safety", "refused", validation.safety),
                ("task", "over-refused", validation.task),
            ):
                found[kept] = sum(agreeing(self.language_model, replies))
                if self.request.refusals:
                    found[refused] = sum(map(self._is_refusal, self.language_model.answers(replies)))
            found["general"] = sum(self._are_answered(validation.general, general_of_aligned))
        return found

    def _are_answered(self, own: Sequence[Reply], aligned: Sequence[Reply]) -> list[bool]:
        """Whether the model, as it now stands, answers general prompts, which have these replies of both models.

        See `Point.general`.
        """
        if self.request.refusals:
            return [not self._is_refusal(answer) for answer in self.language_model.answers(own)]
        return list(map(max, agreeing(self.language_model, own), agreeing(self.language_model, aligned)))

    def _is_refusal(self, answer: str) -> bool:
        return any(text.casefold() in answer.casefold() for text in self.request.refusals)


def validation_of(replies: Replies) -> Replies:
    """Return the replies in the validation split."""
    return Replies(*(selected(kind, validation=True) for kind in replies.kinds))


def _prompt(reply: Reply) -> tuple[int, ...]:
    return tuple(reply.tokens[: reply.start].tolist())


def selected(every: Sequence[Item], *, validation: bool) -> list[Item]:
    """Return those in the validation split, or the others."""
    return [each for at, each in enumerate(every) if (at % VALIDATION_STRIDE == VALIDATION_STRIDE - 1) == validation]
