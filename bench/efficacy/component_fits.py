"""Gains of whole components, fitted on one adapter or on several: what came before gains of single directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import policies
import torch
import ways
from policies import Corrected
from scenario import Adapter
from subject import Bench, Subject
from torch import Tensor

import csulora
from csulora import Override, Policy, controls
from csulora.tuning import sweep
from csulora.tuning.fit import Case, fit
from csulora.tuning.gains import PerComponent, PerModule
from csulora.tuning.options import Options
from csulora.tuning.update import Update

RANK = 8  # directions per module
ALONE = Options()  # both kinds of prompt weigh the same
TOGETHER = replace(ALONE, steps=150)  # on several adapters
Carried = dict[str, tuple[csulora.Subspace, Policy]]  # name of a way -> the policy, and the subspace file it is for


def gains_policy(modules: Sequence[str], gains: Tensor) -> Policy:
    """The policy with these gains (modules, 4)."""
    return sweep.fitted(modules, gains, others=False, rest={})


def penalties_policy(modules: Sequence[str], penalties: Tensor) -> Policy:
    """The policy with these penalties (modules, 3)."""
    overrides = (Override(name, penalties=tuple(row)) for name, row in zip(modules, penalties.tolist(), strict=True))
    return Policy.none(overrides=tuple(overrides))


def fits(subject: Subject) -> Carried:
    """Family -> its subspaces, and the gains fitted on the adapter: the policy, and fitted controls."""
    bench = subject.bench
    known = controls.truncated(bench.subspace, RANK)
    targets = Update.of(subject.adapter, known).targets
    subspaces = {
        "tuned": known,
        "tuned random subspace": controls.random_subspaces(known, seed=bench.scenario.seed),
        "tuned own subspace": controls.own_subspaces(known, subject.adapter, targets),
        "tuned scaling": known,
    }
    found = {}
    for family, subspace in subspaces.items():
        gains = PerModule(len(bench.modules), components=1 if family == "tuned scaling" else 4)
        parameters = fit(bench.language_model, [subject.case(subspace)], gains, ALONE)
        found[family] = subspace, gains_policy(bench.modules, gains.gains(parameters))
    return found


def fitted(subject: Subject) -> Iterator[Corrected]:
    """An adapter under what is fitted on it."""
    for family, (subspace, policy) in fits(subject).items():
        name = "per module" if family == "tuned scaling" else f"k={RANK}"
        done = policies.apply(family, name, subject.adapter, subspace, policy, control=family != "tuned")
        yield done
        if family == "tuned":
            yield policies.scaled_as_much(subject.adapter, subspace, done)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fits on several adapters of one scenario, whose gains are carried over to others."""

    bench: Bench
    specs: Sequence[Adapter]

    @cached_property
    def known(self) -> csulora.Subspace:
        """The subspaces in which components are told apart."""
        return controls.truncated(self.bench.subspace, RANK)

    @cached_property
    def random(self) -> csulora.Subspace:
        """As many random directions."""
        return controls.random_subspaces(self.known, seed=self.bench.scenario.seed)

    @cached_property
    def cases(self) -> list[Case]:
        """The adapters as the fit takes them."""
        return self._cases(self.known)

    def carried(self) -> Carried:
        """Name of a way to carry over -> its subspace file and policy, each fitted on the same adapters and prompts."""
        count = len(self.bench.modules)
        shrunk, free = (replace(TOGETHER, relative_change_weight=weight) for weight in (0.3, 0.0))
        separate = torch.stack([self._gains(PerModule(count), [case], ALONE) for case in self.cases])
        gains = {
            "joint": self._gains(PerModule(count), self.cases),
            "average": separate.mean(0),
            "least": separate.amin(0),
            "shrunk": self._gains(PerModule(count), self.cases, shrunk),
            "free": self._gains(PerModule(count), self.cases, free),
            "smooth": self._gains(ways.Smooth(self.bench.modules), self.cases),
            "global": self._gains(ways.Global(), self.cases),
        }
        scaling = self._gains(PerModule(count, components=1), self.cases)
        in_random = self._gains(PerModule(count), self._cases(self.random))
        return {
            **{way: (self.known, gains_policy(self.bench.modules, each)) for way, each in gains.items()},
            "penalties": (self.known, self._penalties()),
            "tuned scaling": (self.known, gains_policy(self.bench.modules, scaling)),
            "tuned random subspace": (self.random, gains_policy(self.bench.modules, in_random)),
        }

    def _cases(self, subspace: csulora.Subspace) -> list[Case]:
        return [self.bench.subject(spec).case(subspace) for spec in self.specs]

    def _gains(self, gains: PerComponent, cases: Sequence[Case], options: Options = TOGETHER) -> Tensor:
        """Fitted gains (modules, 4) that do not depend on an update's energies."""
        count = len(self.bench.modules)
        parameters = fit(self.bench.language_model, cases, gains, options)
        return gains(parameters, torch.arange(count), torch.zeros(count, 4))

    def _penalties(self) -> Policy:
        penalties = ways.Penalties(len(self.bench.modules))
        parameters = fit(self.bench.language_model, self.cases, penalties, TOGETHER)
        return penalties_policy(self.bench.modules, penalties.penalties(parameters))
