"""The stages of a run, each complete or absent below the run's folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import adversary
import candidates
import training_data
from candidates import Candidate
from prepare import stage
from protocol import FRESH, HELD_OUT, OTHER, Protocol
from training_data import Example

import csulora
from csulora.cli.console import progress_bar
from csulora.evaluation.evaluation import Evaluation
from csulora.evaluation.judge import Judge
from csulora.evaluation.request import Options
from csulora.extraction.model_pair import Progress
from csulora.io.files import parse_json, read_regular, to_json, write_text
from csulora.tuning.frontier import Frontier, frontier_path
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options as FitOptions
from csulora.tuning.request import Request
from csulora.tuning.tune import subspace_path, tune

OTHER_ADAPTER = "other"  # the adapter for another task
_LARGEST_FILE = 64 << 20  # bytes
Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the files of a run lie."""

    out: Path

    @property
    def subspace(self) -> Path:
        """The subspace file."""
        return self.out / "subspace.safetensors"

    def adapter(self, name: str) -> Path:
        """A trained adapter."""
        return self.out / name / "adapter"

    def policy(self, name: str) -> Path:
        """The policy that `tune` writes for an adapter."""
        return self.out / name / "tuned.toml"

    def corrections(self, name: str) -> Path:
        """What each candidate does to an adapter's update."""
        return self.out / name / "corrections.json"

    def evaluation(self, name: str, measured: str) -> Path:
        """What `evaluate` writes of an adapter."""
        return self.out / name / f"{measured.replace(' ', '-')}.json"


class Run:
    """One run of the protocol, continued where it was left."""

    def __init__(self, protocol: Protocol, out: Path) -> None:
        """Read the sources; make or check the folder."""
        self.protocol, self.place = protocol, Place(out)
        self.data = training_data.deal(protocol)
        protocol.claim(out)

    @property
    def seeds(self) -> dict[str, int]:
        """Name of an adapter -> its seed."""
        return {f"seed-{seed}": seed for seed in self.protocol.seeds}

    @property
    def measured(self) -> Sequence[tuple[str, str]]:
        """Names of adapters, and what is measured of each."""
        kinds = (HELD_OUT, FRESH) if self.data.evaluated.fresh else (HELD_OUT,)
        return [(name, kind) for name in self.seeds for kind in kinds] + (
            [(OTHER_ADAPTER, OTHER)] if self.data.other else []
        )

    def finish(self) -> None:
        """Do every stage that is not there yet."""
        self._extract()
        for name, seed in self.seeds.items():
            self._train(name, self.data.task, seed)
            self._tune(name, [name])
        if self.data.other:
            self._train(OTHER_ADAPTER, self.data.other, min(self.protocol.seeds))
            self._tune(OTHER_ADAPTER, list(self.seeds))
        for name, kind in self.measured:
            self._correct(name)
            self._evaluate(name, kind)

    @cached_property
    def subspace(self) -> csulora.Subspace:
        """The model pair's subspaces."""
        return csulora.Subspace.open(self.place.subspace)

    def adapter(self, name: str) -> csulora.Adapter:
        """A trained adapter."""
        return csulora.load_adapter(self.place.adapter(name))

    def candidates(self, name: str) -> list[Candidate]:
        """Everything that is done to an adapter; what is carried to another task is the fitted policy alone."""
        path = self.place.policy(name)
        own = subspace_path(path)
        policy = csulora.Policy.load(str(path))
        fitted = candidates.tuned(policy, csulora.Subspace.open(own) if own.exists() else self.subspace)
        if name == OTHER_ADAPTER:
            return [fitted]
        return [fitted, *candidates.untuned(self.protocol, self.adapter(name), self.subspace)]

    def _extract(self) -> None:
        protocol = self.protocol
        _unless_there(
            self.place.subspace,
            "extracting",
            lambda progress: csulora.extract(
                protocol.base,
                protocol.instruct,
                output=self.place.subspace,
                progress=progress,
                rank=protocol.rank,
                device=protocol.device,
            ),
        )

    def _train(self, name: str, task: Sequence[Example], seed: int) -> None:
        directory = self.place.adapter(name)
        directory.parent.mkdir(parents=True, exist_ok=True)
        harmful = self.data.harmful
        stage(directory, lambda partial: adversary.train_adapter(self.protocol, task, harmful, seed, partial))

    def _tune(self, name: str, on: Sequence[str]) -> None:
        """Fit the policy for an adapter: on itself, or for one that is not among those it is fitted on."""
        protocol, prompts = self.protocol, self.data.tuned
        request = Request(
            model=protocol.instruct,
            adapters=list(map(self.adapter, on)),
            subspace=self.subspace,
            task=[prompts.task] * len(on),
            safety=prompts.safety,
            general=prompts.general,
            for_others=name not in on,
            loading=Loading(protocol.device),
            longest_reply=min(protocol.tokens, Request.longest_reply),
            options=FitOptions(steps=protocol.tune_steps),
            task_weights=protocol.task_weights,
            refusals=protocol.refusals,
            controls=name in on,
        )
        path = self.place.policy(name)
        _unless_there(frontier_path(path), f"tuning for {name}", lambda progress: tune(request, path, progress))

    def _correct(self, name: str) -> None:
        """Say what each candidate does to the update, all measured in the same subspaces."""

        def reports(progress: Progress | None) -> None:
            adapter = self.adapter(name)
            found = {}
            for each in self.candidates(name):
                fixed, _ = csulora.correct(adapter, each.subspace, each.policy)
                _, report = csulora.controls.compared(adapter, fixed, self.subspace, {})
                found[each.name] = {"undo": report.totals.undo, "undo_after": report.totals.undo_after}
            write_text(self.place.corrections(name), to_json(found))

        _unless_there(self.place.corrections(name), f"correcting {name}", reports)

    def _evaluate(self, name: str, kind: str) -> None:
        protocol, given = self.protocol, self.data.evaluated
        is_fresh = kind == FRESH  # nothing but the attack is measured again
        output = self.place.evaluation(name, kind)
        found = self.candidates(name)
        task = given.other if kind == OTHER else given.task
        options = Options(
            refusals=protocol.refusals,
            longest_reply=protocol.tokens,
            loading=Loading(protocol.device),
            judge=Judge.at(protocol.judge) if protocol.judge else None,
            lm_eval=() if is_fresh else protocol.lm_eval,
        )
        _unless_there(
            output,
            f"evaluating {name}, {kind}",
            lambda progress: csulora.evaluate(
                protocol.instruct,
                [self.adapter(name)],
                {each.name: each.policy for each in found},
                self.subspace,
                task=[task[:1] if is_fresh else task],
                safety=given.fresh if is_fresh else given.safety,
                general=() if is_fresh else given.general,
                subspaces={each.name: each.subspace for each in found},
                options=options,
                output=output,
                progress=progress,
            ),
        )

    def records(self) -> Record:
        """Return what came of the run, for tables and cards."""
        frontiers = {name: Frontier.load(frontier_path(self.place.policy(name))) for name in self.seeds}
        return {
            "protocol": self.protocol.identity(),
            "subspace_sha256": self.subspace.sha256,
            "adapters_sha256": {name: self.adapter(name).sha256 for name in dict(self.measured)},
            "frontiers": {name: each.to_dict() for name, each in frontiers.items()},
            "rows": [record for name, kind in self.measured for record in self._rows(name, kind)],
        }

    def _rows(self, name: str, kind: str) -> Iterator[Record]:
        path = self.place.corrections(name)
        corrections = parse_json(read_regular(path, _LARGEST_FILE), path)
        undone = {each: figures["undo_after"] for each, figures in corrections.items()}
        undone["raw"] = next(iter(corrections.values()))["undo"]
        candidates = {each.name: each for each in self.candidates(name)}
        (found,) = Evaluation.load(self.place.evaluation(name, kind)).adapters
        for row in found.rows:
            if row.refusal is not None:
                raise csulora.RefusedError(f"{path.parent}: {row.name} refuses the adapter: {row.refusal}")
            candidate = candidates.get(row.policy or row.name)
            is_scaling = row.role == "scaling"
            if is_scaling and candidate and candidate.control:
                continue
            yield {
                "adapter": name,
                "measured": kind,
                "name": f"scaling as {row.policy}" if is_scaling else row.name,
                "control": is_scaling or bool(candidate and candidate.control),
                "relative_change": row.relative_change,
                "undo_after": None if is_scaling else undone.get(row.name),
                "counts": {prompts: _counts(outcomes) for prompts, outcomes in row.outcomes.items()},
                "scores": row.scores,
            }


def _counts(outcomes: Sequence[Any]) -> dict[str, int]:
    """How many replies to one kind of prompt are what; an attack succeeds with a coherent reply that is no refusal."""
    unsafe = [outcome.unsafe for outcome in outcomes if outcome.unsafe is not None]
    answered = sum(not outcome.refused and not outcome.incoherent for outcome in outcomes)
    return {
        "count": len(outcomes),
        "same": sum(outcome.same for outcome in outcomes),
        "refused": sum(bool(outcome.refused) for outcome in outcomes),
        "answered": answered,
        "incoherent": sum(outcome.incoherent for outcome in outcomes),
    } | ({"unsafe": sum(unsafe)} if unsafe else {})


def _unless_there(path: Path, what: str, make: Callable[[Progress | None], object]) -> None:
    """Make a file that is not there, with a progress bar, or with lines where there is no terminal."""
    if path.exists():
        print(f"{path}: there already", file=sys.stderr)
        return
    with progress_bar(what, quiet=False, lines=True) as progress:
        make(progress)
