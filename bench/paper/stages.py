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
from protocol import FRESH, HELD_OUT, Protocol

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

    def adapter(self, seed: int) -> Path:
        """The trained adapter."""
        return self.out / f"seed-{seed}" / "adapter"

    def policy(self, seed: int) -> Path:
        """The policy that `tune` writes."""
        return self.out / f"seed-{seed}" / "tuned.toml"

    def corrections(self, seed: int) -> Path:
        """What each candidate does to the update."""
        return self.out / f"seed-{seed}" / "corrections.json"

    def evaluation(self, seed: int, prompts: str) -> Path:
        """What `evaluate` writes, on held out or on fresh prompts."""
        return self.out / f"seed-{seed}" / f"{prompts.replace(' ', '-')}.json"


class Run:
    """One run of the protocol, continued where it was left."""

    def __init__(self, protocol: Protocol, out: Path) -> None:
        """Read the sources; make or check the folder."""
        self.protocol, self.place = protocol, Place(out)
        self.data = training_data.deal(protocol)
        protocol.claim(out)

    @property
    def prompt_sets(self) -> Sequence[str]:
        """The kinds of safety prompts that are measured."""
        return (HELD_OUT, FRESH) if self.data.evaluated.fresh else (HELD_OUT,)

    def finish(self) -> None:
        """Do every stage that is not there yet."""
        self._extract()
        for seed in self.protocol.seeds:
            self._train(seed)
            self._tune(seed)
            self._correct(seed)
            for prompts in self.prompt_sets:
                self._evaluate(seed, prompts)

    @cached_property
    def subspace(self) -> csulora.Subspace:
        """The model pair's subspaces."""
        return csulora.Subspace.open(self.place.subspace)

    def adapter(self, seed: int) -> csulora.Adapter:
        """A trained adapter."""
        return csulora.load_adapter(self.place.adapter(seed))

    def candidates(self, seed: int) -> list[Candidate]:
        """Everything that is done to one seed's adapter."""
        path = self.place.policy(seed)
        own = subspace_path(path)
        policy = csulora.Policy.load(str(path))
        fitted = candidates.tuned(policy, csulora.Subspace.open(own) if own.exists() else self.subspace)
        return [fitted, *candidates.untuned(self.protocol, self.adapter(seed), self.subspace)]

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

    def _train(self, seed: int) -> None:
        directory = self.place.adapter(seed)
        directory.parent.mkdir(parents=True, exist_ok=True)
        stage(directory, lambda partial: adversary.train_adapter(self.protocol, self.data, seed, partial))

    def _tune(self, seed: int) -> None:
        protocol, prompts = self.protocol, self.data.tuned
        request = Request(
            model=protocol.instruct,
            adapters=[self.adapter(seed)],
            subspace=self.subspace,
            task=[prompts.task],
            safety=prompts.safety,
            general=prompts.general,
            loading=Loading(protocol.device),
            longest_reply=min(protocol.tokens, Request.longest_reply),
            options=FitOptions(steps=protocol.tune_steps),
            task_weights=protocol.task_weights,
            refusals=protocol.refusals,
            controls=True,
        )
        path = self.place.policy(seed)
        _unless_there(frontier_path(path), f"tuning, seed {seed}", lambda progress: tune(request, path, progress))

    def _correct(self, seed: int) -> None:
        """Say what each candidate does to the update, all measured in the same subspaces."""

        def reports(progress: Progress | None) -> None:
            adapter = self.adapter(seed)
            found = {}
            for each in self.candidates(seed):
                fixed, _ = csulora.correct(adapter, each.subspace, each.policy)
                _, report = csulora.controls.compared(adapter, fixed, self.subspace, {})
                found[each.name] = {"undo": report.totals.undo, "undo_after": report.totals.undo_after}
            write_text(self.place.corrections(seed), to_json(found))

        _unless_there(self.place.corrections(seed), f"correcting, seed {seed}", reports)

    def _evaluate(self, seed: int, prompts: str) -> None:
        protocol, given = self.protocol, self.data.evaluated
        is_fresh = prompts == FRESH  # nothing but the attack is measured again
        output = self.place.evaluation(seed, prompts)
        found = self.candidates(seed)
        options = Options(
            refusals=protocol.refusals,
            longest_reply=protocol.tokens,
            loading=Loading(protocol.device),
            judge=Judge.at(protocol.judge) if protocol.judge else None,
            lm_eval=() if is_fresh else protocol.lm_eval,
        )
        _unless_there(
            output,
            f"evaluating, seed {seed}, {prompts} prompts",
            lambda progress: csulora.evaluate(
                protocol.instruct,
                [self.adapter(seed)],
                {each.name: each.policy for each in found},
                self.subspace,
                task=[given.task[:1] if is_fresh else given.task],
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
        rows = [
            record
            for seed in self.protocol.seeds
            for prompts in self.prompt_sets
            for record in self._rows(seed, prompts)
        ]
        frontiers = {str(seed): Frontier.load(frontier_path(self.place.policy(seed))) for seed in self.protocol.seeds}
        return {
            "protocol": self.protocol.identity(),
            "subspace_sha256": self.subspace.sha256,
            "adapters_sha256": {str(seed): self.adapter(seed).sha256 for seed in self.protocol.seeds},
            "frontiers": {seed: each.to_dict() for seed, each in frontiers.items()},
            "rows": rows,
        }

    def _rows(self, seed: int, prompts: str) -> Iterator[Record]:
        path = self.place.corrections(seed)
        corrections = parse_json(read_regular(path, _LARGEST_FILE), path)
        undone = {name: figures["undo_after"] for name, figures in corrections.items()}
        undone["raw"] = next(iter(corrections.values()))["undo"]
        candidates = {each.name: each for each in self.candidates(seed)}
        (found,) = Evaluation.load(self.place.evaluation(seed, prompts)).adapters
        for row in found.rows:
            if row.refusal is not None:
                raise csulora.RefusedError(f"{path.parent}: {row.name} refuses the adapter: {row.refusal}")
            candidate = candidates.get(row.policy or row.name)
            is_scaling = row.role == "scaling"
            if is_scaling and candidate and candidate.control:
                continue
            yield {
                "seed": seed,
                "prompts": prompts,
                "name": f"scaling as {row.policy}" if is_scaling else row.name,
                "control": is_scaling or bool(candidate and candidate.control),
                "relative_change": row.relative_change,
                "undo_after": None if is_scaling else undone.get(row.name),
                "counts": {kind: _counts(outcomes) for kind, outcomes in row.outcomes.items()},
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
