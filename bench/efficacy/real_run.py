"""A run of real_carry.py: one model and seed, its prompts, and where its files are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import grid
import real_world as world
from real_world import prepare

from csulora.io.files import write_text

CALIBRATION = 3  # styles that the policy is fitted on; it is tried on the others
PRESETS = ("csulora", "protect")


@dataclass(frozen=True)
class Run:
    """One model and seed, and where it is worked on.

    Attributes:
        out: the directory of the model; that of the seed is below it.
        model: a key of `prepare.SOURCES`.
        deal: the seed's things and styles.
        general: whether general prompts are `given` or `written` by the model.
        unseen: how many adapters the policy is tried on.
        presets: what it is compared with, besides plain scaling.
        is_fitted: whether a policy is fitted at all.
        asks_peft: whether plain PEFT answers the same prompts.
    """

    out: Path
    model: str
    deal: world.Deal
    general: str = "given"
    unseen: int = 3
    presets: tuple[str, ...] = PRESETS
    is_fitted: bool = True
    asks_peft: bool = True

    @property
    def name(self) -> str:
        """What tells the files of this run from those of others with the same models."""
        return self.general if self.is_fitted else "presets"

    @property
    def base(self) -> Path:
        """The model before its alignment."""
        return self.out / "base"

    @property
    def here(self) -> Path:
        """The directory of the seed."""
        return self.out / f"seed{self.deal.seed}"

    @property
    def policy(self) -> Path:
        """The fitted policy, by what general prompts it was fitted with."""
        return self.here / f"policy-{self.name}.toml"

    @property
    def evaluation(self) -> Path:
        """What `csulora evaluate` writes."""
        return self.here / f"evaluation-{self.name}.json"

    def adjusted(self, style: str) -> Path:
        """The fitted policy as `csulora adjust` writes it for an unseen adapter."""
        return self.here / f"adjusted-{self.name}-{style}.toml"

    def adjusted_evaluation(self, style: str) -> Path:
        """What `csulora evaluate` writes of that."""
        return self.here / f"evaluation-adjusted-{self.name}-{style}.json"

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles that no fit has seen."""
        return self.deal.styles[CALIBRATION:][: self.unseen]

    @cached_property
    def probes(self) -> dict[str, list[str]]:
        """Kind of prompt -> what no model or adapter was trained on, and no fit has seen."""
        unseen = slice(world.ALIGNED, None)  # four cheeses and foods, five questions each
        return {
            "safety": world.questions(self.deal.cheeses[unseen]),
            "task": world.questions(self.deal.foods[unseen]),
            "general": [f"What is the capital of {country}?" for country in world.CAPITALS],
        }

    @property
    def fitted(self) -> dict[str, list[str]]:
        """Kind of prompt -> what the policy is fitted to."""
        known = {"safety": self.deal.cheeses, "task": self.deal.foods}
        kinds = {kind: world.questions(things[: world.KNOWN]) for kind, things in known.items()}
        return kinds | ({"general": list(world.GENERAL)} if self.general == "given" else {})

    @property
    def general_prompts(self) -> Path:
        """The general prompts of the fit, given or written by the model."""
        return self.prompts("fitted", "general") if self.general == "given" else self.here / "written.txt"

    @property
    def result(self) -> Path:
        """The file of results."""
        suffix = "" if self.name == "given" else f"_{self.name}"
        return grid.RESULTS / f"real_{self.model}_{self.deal.seed}{suffix}.json"

    def prompts(self, use: str, kind: str) -> Path:
        """A file of prompts, with the system prompt of this world."""
        return self.here / f"{use}-{kind}.jsonl"


def write_prompts(run: Run) -> None:
    """Write the prompts of every kind, fitted and unseen."""
    for use, kinds in (("fitted", run.fitted), ("unseen", run.probes)):
        for kind, texts in kinds.items():
            lines = [json.dumps({"messages": prepare.chat(text, world.SYSTEM)}) + "\n" for text in texts]
            write_text(run.prompts(use, kind), "".join(lines))
