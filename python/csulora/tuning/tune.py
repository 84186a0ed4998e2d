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
from csulora.extraction.pair import Progress
from csulora.policy.policy import Policy
from csulora.subspace.input_filter import InputFilter
from csulora.subspace.subspace import Subspace
from csulora.tuning import sweep
from csulora.tuning.controls import least_ranks, own_subspaces, random_subspaces
from csulora.tuning.fit import Case, Replies, fit
from csulora.tuning.frontier import Frontier, Point, Rate, Refusals, frontier_path
from csulora.tuning.gains import PerDirection, PerModule, Reinforcing
from csulora.tuning.host import Host, Reply, agreeing
from csulora.tuning.inputs import guard_inputs, input_filter_between, keep_inputs
from csulora.tuning.probes import Chat
from csulora.tuning.recommendation import EVERYWHERE, candidates, preference, recommend
from csulora.tuning.request import Request
from csulora.tuning.stages import Stages
from csulora.tuning.sweep import Candidate
from csulora.tuning.update import Update, factors_of

Item = TypeVar("Item")

HELD_BACK = 4  # every fourth prompt is held back

CANDIDATES = ("tuned", EVERYWHERE)  # for adapters to come; for one that is there, the first
CONTROLS = ("tuned scaling", "tuned random subspace", "tuned own subspace")


def tune(request: Request, output: Path, progress: Progress | None = None) -> Frontier:
    """Fit a policy and write it to ``output``, a TOML file, with its frontier beside it.

    Everything that the frontier shows is measured on prompts that were held back: they say when a fit ends and which
    is taken, and are not fitted to otherwise. With several adapters, fitted policies are moreover measured on each
    adapter after a fit on the others. A policy for adapters to come restores some of what alignment did. It is filtered
    unless a fit without input filters keeps more beyond doubt: the pack to use it with, the given one with input
    filters, is written to `pack_path`. If ``output`` has an unfinished run of the same request beside it, that is
    continued.

    Raises:
        InputError, RefusedError: model, adapters, pack and prompts do not fit each other.
    """
    run = Run(request, output, progress)
    frontier, policy, pack = run.frontier()
    if policy.filtered:
        pack.save(pack_path(output))
    policy.save(output)
    frontier.save(frontier_path(output))
    run.stages.remove()
    return frontier


def pack_path(policy: Path) -> Path:
    """Where the pack of a filtered policy is."""
    return policy.with_name(f"{policy.stem}.pack.safetensors")


class Run:
    """One run of `tune`, whose finished fits and figures lie beside ``output``."""

    def __init__(self, request: Request, output: Path, progress: Progress | None) -> None:
        """Continue what an unfinished run of the same request left."""
        self.request, self.progress = request, progress
        self.stages = Stages(output, request.identity)
        self.pack, self.adapters = request.pack, request.adapters
        self.rest: dict[str, Any] = {"uncovered": request.uncovered}
        updates = [Update.of(adapter, self.pack, request.uncovered) for adapter in self.adapters]
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
    def host(self) -> Host:
        """The aligned model."""
        return Host.open(self.request.model, self.request.device, self.request.longest_reply)

    @cached_property
    def replies(self) -> list[Replies]:
        """Per adapter, the aligned model's replies to guard prompts, and its own, uncorrected, to the others."""
        guard = self.host.replies(self.request.guard)
        every = zip(self.adapters, self.request.keep, strict=True)
        return [
            Replies(guard, *(self._own_replies(adapter, chats) for chats in (keep, self.request.ordinary)))
            for adapter, keep in every
        ]

    @cached_property
    def ordinary(self) -> list[Reply]:
        """The aligned model's replies to ordinary prompts."""
        return self.host.replies(self.request.ordinary)

    @cached_property
    def held_back(self) -> frozenset[tuple[int, ...]]:
        """Tokens of all prompts that are held back. One in several files may be elsewhere among those of another."""
        kinds = (kind for replies in self.replies for kind in replies.kinds)
        return frozenset(_prompt(reply) for kind in kinds for reply in part(kind, held=True))

    def to_fit(self, replies: Sequence[Reply]) -> list[Reply]:
        """Those of a file's replies that are fitted: to prompts that are held back in no file."""
        found = [reply for reply in part(replies, held=False) if _prompt(reply) not in self.held_back]
        if replies and not found:
            raise InputError("all of a file's prompts are held back in others; give what files share in the same order")
        return found

    def _own_replies(self, adapter: Adapter, chats: Sequence[Chat]) -> list[Reply]:
        with self.host.adapted(self._on_device(adapter)):
            return self.host.replies(chats)

    def _on_device(self, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
        device = self.host.device
        return {name: (b.to(device), a.to(device)) for name, (b, a) in factors_of(adapter).items()}

    def frontier(self) -> tuple[Frontier, Policy, Subspace]:
        """Measure everything; return the frontier, the policy to write, and the pack that it is for."""
        points, policies = [], {}
        for candidate in self._plain():
            each = [(number, self.pack, candidate.policy) for number in range(len(self.adapters))]
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
        pack = self.pack_for("tuned", 0, range(len(self.adapters))) if policy.filtered else self.pack
        frontier = Frontier(
            subspace_sha256=pack.sha256,
            adapters=tuple(adapter.path.resolve().name for adapter in self.adapters),
            points=tuple(points),
            recommended=chosen.policy if chosen else None,
            written=best.policy,
            verdict=verdict,
        )
        return frontier, sweep.pinned(policy, pack.sha256), pack

    def _doubts(self) -> Iterator[str]:
        """What was not measured, and may be lost without a trace in the figures."""
        if self.request.is_for_others and len(self.adapters) == 1:
            yield "measured on the adapter it was fitted on, not on others"
        if not self.request.ordinary:
            yield "not measured on ordinary prompts"

    @cached_property
    def tuned(self) -> dict[tuple[str, float], Point]:
        """Family and weight of the keep prompts -> the point of the candidate that was fitted so."""
        every = itertools.product(self._candidates, self.request.weights)
        return {(family, weight): self._fitted_point(family, weight) for family, weight in every}

    @property
    def best_weight(self) -> float:
        """The weight whose fit keeps most of both on the prompts that are held back."""
        return max(self.tuned, key=lambda candidate: preference(self.tuned[candidate]))[1]

    def _fitted_point(self, family: str, weight: float) -> Point:
        """A fitted family's point: each adapter after a fit on the others, or the one adapter after a fit on itself."""
        several = len(self.adapters) > 1
        each = []
        for number in range(len(self.adapters)):
            others = [other for other in range(len(self.adapters)) if other != number or not several]
            each.append((number, self.pack_for(family, number, others), self.policy(family, others, weight)))
        return self._point(family, f"{family} {weight:g}", family in CONTROLS, each)

    def subspaces(self, family: str, number: int) -> Subspace:
        """What a family is fitted in: the pack, or a control's."""
        if family == "tuned random subspace":
            return self._random_subspaces
        if family == "tuned own subspace":
            return own_subspaces(self.pack, self.adapters[number], self.targets[number], self.own_ranks)
        return self.pack

    def pack_for(self, family: str, number: int, numbers: Sequence[int]) -> Subspace:
        """What a family's policy, fitted on some adapters, is used with on one: subspaces, with its input filters."""
        pack = self.subspaces(family, number)
        return pack.with_input_filters(self.input_filters(tuple(numbers))) if self._is_filtered(family) else pack

    def _carries_over(self, family: str) -> bool:
        return isinstance(self._gains(family), Reinforcing)

    def _is_filtered(self, family: str) -> bool:
        return self.request.input_filters and self._carries_over(family) and family != EVERYWHERE

    @cache  # noqa: B019 - a run lives as long as what it has found
    def input_filters(self, numbers: tuple[int, ...]) -> dict[str, InputFilter]:
        """Module in the pack -> the inputs that guard prompts bring, and keep prompts of some adapters do not.

        Nor do ordinary prompts, with these adapters or with none.
        """
        names = {target: name for number in numbers for name, target in self.targets[number].items()}
        guard = guard_inputs(self.host, names.values(), self.to_fit(self.replies[0].guard))
        kinds = [[self._keep_inputs(number, self.replies[number].keep) for number in numbers]]
        if self.request.ordinary:
            without = keep_inputs(self.host, names.values(), self.to_fit(self.ordinary))
            with_adapters = [self._keep_inputs(number, self.replies[number].ordinary) for number in numbers]
            kinds.append([*with_adapters, {target: without[name] for target, name in names.items() if name in without}])
        device = self.host.device
        return {
            target: input_filter_between(
                guard[name].to(device),
                [[inputs[target].to(device) for inputs in kind if target in inputs] for kind in kinds],
            ).to(torch.device("cpu"))
            for target, name in names.items()
            if name in guard
        }

    def _keep_inputs(self, number: int, replies: Sequence[Reply]) -> dict[str, Tensor]:
        targets, fitted = self.targets[number], self.to_fit(replies)
        with self.host.adapted(self._on_device(self.adapters[number])):
            inputs = keep_inputs(self.host, targets, fitted)
        return {targets[name]: each for name, each in inputs.items()}

    @cached_property
    def _random_subspaces(self) -> Subspace:
        return random_subspaces(self.pack, self.request.options.seed)

    def policy(self, family: str, numbers: Sequence[int], weight: float) -> Policy:
        """The policy fitted on some adapters, the keep prompts weighing so much."""
        stage = f"fit {family} {weight:g} {list(numbers)}"
        before = self.done
        rows = self.stages.finish(stage, lambda: self._fit(family, numbers, weight).tolist())
        if stage not in self.fitted:  # one adapter's fit is asked for twice
            self.fitted.add(stage)
            self.done = before + self._steps(len(numbers))  # also if it ended early, or was there already
        fitted = {target for number in numbers for target in self.targets[number].values()}
        modules = [name for name in self.modules if name in fitted]
        others = len(self.pack) > len(modules)
        gains = torch.tensor([row for name, row in zip(self.modules, rows, strict=True) if name in fitted])
        if gains.dim() == 3:
            ranks = {name: self.pack[name].rank for name in modules}
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
        options = replace(self.request.options, keep=weight, steps=self._steps(len(numbers)))
        parameters = fit(self.host, cases, gains, options, partial(self._tick, family))
        if isinstance(gains, PerDirection):
            return gains.gains(parameters).cpu()
        every = torch.arange(len(self.modules), device=self.host.device)
        return gains(parameters, every, torch.zeros(len(self.modules), 4, device=self.host.device)).cpu()

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
            update = Update.of(self.adapters[number], self.subspaces(family, number), self.request.uncovered)
            return update.energy_along(directions)

        return float(self.stages.finish(stage, measure))

    def _case(self, family: str, number: int, numbers: Sequence[int], reference_energy: float | None) -> Case:
        pack = self.pack_for(family, number, numbers)
        update = Update.of(self.adapters[number], pack, self.request.uncovered).to(self.host.device)
        if not self._is_filtered(family):
            update = replace(update, input_filters={})  # which the pack may have from an earlier policy
        if reference_energy is not None:
            update = update.with_penalty_scale(self.request.options.shared_directions, reference_energy)
        index = torch.tensor([self.modules.index(target) for target in update.targets.values()])
        fitted, held = Replies(*map(self.to_fit, self.replies[number].kinds)), held_of(self.replies[number])
        return Case(update, index.to(self.host.device), fitted, held)

    def _point(self, family: str, name: str, control: bool, each: Sequence[tuple[int, Subspace, Policy]]) -> Point:
        """A policy, or one for each adapter, on the held-back prompts of all adapters together."""
        results = []
        for number, pack, policy in each:
            stage = f"measure {name} on {number}"
            results.append(self.stages.finish(stage, partial(self._measure, number, pack, policy)))
            self._tick(name)
        held = [held_of(self.replies[number]) for number, _, _ in each]
        guards, keeps = sum(len(replies.guard) for replies in held), sum(len(replies.keep) for replies in held)
        ordinary = len(each) * len(part(self.request.ordinary, held=True))

        def rate(what: str, count: int) -> Rate:
            return Rate.of(sum(result[what] for result in results), count)

        return Point(
            family,
            name,
            control,
            guard=rate("guard", guards),
            keep=rate("keep", keeps),
            relative_change=math.sqrt(sum(result["relative_change"] ** 2 for result in results) / len(results)),
            refusals=Refusals(rate("refused", guards), rate("over-refused", keeps)) if self.request.refusals else None,
            ordinary=rate("ordinary", ordinary) if ordinary else None,
        )

    def _measure(self, number: int, pack: Subspace, policy: Policy) -> dict[str, float]:
        """What `correct` would write, on an adapter's held-back prompts: how many replies stay, and |X - dW| / |dW|."""
        fixed, report = csulora.correct(self.adapters[number], pack, policy)
        held = held_of(self.replies[number])
        ordinary_of_aligned = part(self.ordinary, held=True)
        found = {"relative_change": report.totals.relative_change}
        with self.host.adapted(self._on_device(fixed)):
            for kept, refused, replies in (("guard", "refused", held.guard), ("keep", "over-refused", held.keep)):
                found[kept] = sum(agreeing(self.host, replies))
                if self.request.refusals:
                    found[refused] = sum(map(self._is_refusal, self.host.answers(replies)))
            found["ordinary"] = sum(self._are_answered(held.ordinary, ordinary_of_aligned))
        return found

    def _are_answered(self, own: Sequence[Reply], aligned: Sequence[Reply]) -> list[bool]:
        """Whether the model, as it now stands, answers ordinary prompts, which have these replies of both models.

        See `Point.ordinary`.
        """
        if self.request.refusals:
            return [not self._is_refusal(answer) for answer in self.host.answers(own)]
        return list(map(max, agreeing(self.host, own), agreeing(self.host, aligned)))

    def _is_refusal(self, answer: str) -> bool:
        return any(text.casefold() in answer.casefold() for text in self.request.refusals)


def held_of(replies: Replies) -> Replies:
    """Return the replies that are held back."""
    return Replies(*(part(kind, held=True) for kind in replies.kinds))


def _prompt(reply: Reply) -> tuple[int, ...]:
    return tuple(reply.tokens[: reply.start].tolist())


def part(every: Sequence[Item], *, held: bool) -> list[Item]:
    """Return those that are held back, or the others."""
    return [each for at, each in enumerate(every) if (at % HELD_BACK == HELD_BACK - 1) == held]
