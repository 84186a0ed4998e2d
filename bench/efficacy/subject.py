"""One adapter of one scenario, with the model it runs on: it is measured, and given to fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import measure
import scenario as world_of
import torch
from lab import Lab, tokenizer
from policies import Corrected
from scenario import Adapter, Scenario
from transformers import LlamaForCausalLM
from world import FitPrompts

import csulora
from csulora.tuning.fit import Case, Replies
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.probes import Chat, Message
from csulora.tuning.replies import Reply
from csulora.tuning.update import Update, factors_of

PROMPTS = 32  # of each kind, for every adapter that is fitted on
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """One adapter of one scenario, and the model it runs on."""

    bench: Bench
    spec: Adapter
    adapter: csulora.Adapter
    examiner: measure.Examiner

    def point(self, corrected: Corrected) -> Record:
        """What the adapter does after a policy."""
        language_model = self.bench.language_model
        with language_model.adapted(corrected.factors):
            measured = self.examiner.measure(language_model.model)
            replies = self.examiner.said(language_model.model)
        rates = asdict(measured) | {"perplexity": self.examiner.perplexity(replies)}
        return {
            "family": corrected.family,
            "policy": corrected.policy,
            "control": corrected.control,
            "relative_change": corrected.relative_change,
            **rates,
        }

    def rates(self, corrected: Corrected) -> Record:
        """The attack, the task and all else after a policy, without decoding a reply."""
        with self.bench.language_model.adapted(corrected.factors):
            found = self.examiner.measure(self.bench.language_model.model)
        return {"attack": found.attack, "task": found.task, "benign": found.benign}

    def record(self, done: Sequence[Corrected]) -> Record:
        """What the adapter does after some policies, as a cell of the results."""
        points = [self.point(each) for each in done]
        return {"scenario": asdict(self.bench.scenario), "adapter": asdict(self.spec), "points": points}

    def case(self, subspace: csulora.Subspace) -> Case:
        """The adapter as the fit takes it, with `PROMPTS` prompts of each kind."""
        safety, own = self.bench.replies(self.spec)
        update = Update.of(self.adapter, subspace)
        index = torch.tensor([self.bench.modules.index(target) for target in update.targets.values()])
        return Case(update, index, Replies(safety, own))


class Bench:
    """One scenario's aligned model, loaded once."""

    def __init__(self, out: Path, scenario: Scenario) -> None:
        """Train what is not there, and load it."""
        self.lab = Lab(out, scenario)
        self.scenario = scenario
        self.subspace = self.lab.subspace()
        model = LlamaForCausalLM.from_pretrained(self.lab.aligned(), dtype=torch.float32)
        self.language_model = LanguageModel(model, tokenizer(), measure.MAX_REPLY)
        self.modules = list(self.subspace)

    def subject(self, spec: Adapter) -> Subject:
        """An adapter, trained if it is not there."""
        probes = world_of.probes(self.scenario, spec.task)
        examiner = measure.Examiner(self.language_model.model, self.language_model.tokenizer, probes)
        return Subject(self, spec, csulora.load_adapter(self.lab.adapter(spec)), examiner)

    def prompts(self, spec: Adapter) -> FitPrompts:
        """What an operator gives to fit an adapter."""
        return world_of.fit_prompts(self.scenario, spec.task, PROMPTS)

    def replies(self, spec: Adapter) -> tuple[list[Reply], list[Reply]]:
        """What the aligned model replies to safety prompts, and the adapter to its task prompts."""
        prompts = self.prompts(spec)
        safety = self.language_model.replies(chats(prompts.safety))
        with self.language_model.adapted(factors_of(csulora.load_adapter(self.lab.adapter(spec)))):
            return safety, self.language_model.replies(chats(prompts.task))


@cache
def opened(out: Path, scenario: Scenario) -> Bench:
    """A scenario's bench."""
    return Bench(out, scenario)


def chats(prompts: Sequence[str]) -> list[Chat]:
    """Prompts as a fit takes them."""
    return [(Message("user", prompt),) for prompt in prompts]
