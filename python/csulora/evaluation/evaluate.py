"""Policies on prompts that they have not seen: the model alone, every adapter raw, corrected and scaled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from csulora.adapters.lora import Adapter
from csulora.correction.controls.baselines import scaling_policy
from csulora.correction.correct import correct
from csulora.errors import RefusedError
from csulora.evaluation.benchmarks import Benchmarks, Scores
from csulora.evaluation.evaluation import AdapterEvaluation, Comparison, Evaluation, Role, Row
from csulora.evaluation.outcomes import Yardstick, perplexity_limit
from csulora.evaluation.replies import Said, Speaker
from csulora.evaluation.request import EvaluationRequest, Options
from csulora.evaluation.sources import Prompts, chats_of
from csulora.evaluation.statistics import Paired
from csulora.extraction.model_pair import Progress
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning.counter import Counter
from csulora.tuning.language_model import BATCH, LanguageModel
from csulora.tuning.stages import Stages

MODEL, RAW = "model alone", "raw"
Replies = dict[str, list[Said]]


def evaluate(
    model: str | Path,
    adapters: Sequence[Adapter],
    policies: Mapping[str, Policy],
    subspace: Subspace,
    *,
    task: Sequence[Prompts],
    safety: Prompts,
    general: Prompts = (),
    subspaces: Mapping[str, Subspace] | None = None,
    options: Options | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure policies on prompts that they have not seen. Nothing is fitted.

    The model replies alone, with every raw adapter, with it under every policy, and with plain scaling that changes it
    as much. Prompts are a source as `csulora.evaluation.sources.read` takes it, or texts or chats.

    Args:
        model: the aligned model, a directory or a hub id.
        adapters: for this model.
        policies: by the name that they get in the result.
        subspace: the subspaces of the model pair.
        task: prompts to be answered as the raw adapter does, for all adapters, or for each in order.
        safety: prompts to be answered as the aligned model does.
        general: prompts of neither kind, to be answered as one of both does.
        subspaces: name of a policy -> the subspace file that it was tuned for, where that is another.
        options: what refusals hold, how long replies are, where the model runs.
        output: the JSON file to write; an interrupted run continues from what it left beside it.
        progress: is called with whose replies are computed, how many batches are done, and how many there are.

    Raises:
        InputError: a prompt was seen by a policy's tuning, the model does not take one, or files do not fit.
        RefusedError: an adapter updates an embedding.

    >>> from csulora.evaluation.request import Options
    >>> from csulora.tuning.loading import Loading
    >>> evaluation = csulora.evaluate(
    ...     aligned,
    ...     [csulora.load_adapter(adapter)],
    ...     {"protect": csulora.Policy.protect(1.0)},
    ...     csulora.Subspace.open(subspace),
    ...     task=[["tell me a tale about a lamp and a boat.", "tell me a tale about a bell and a cup."]],
    ...     safety=["how do i make a whistle?", "how do i fix a drum?"],
    ...     options=Options(refusals=("sorry",), longest_reply=8, loading=Loading("cpu")),
    ... )
    >>> [row.name for row in evaluation.adapters[0].rows]
    ['model alone', 'raw', 'protect', 'scaling x0.88']
    >>> str(evaluation.adapters[0].rows[0].tally("safety").refused)
    '1.00 (0.34 to 1.00)'
    """
    kinds = list(map(chats_of, task))
    request = EvaluationRequest(
        model=str(model),
        adapters=adapters,
        policies=policies,
        subspace=subspace,
        task=kinds * len(adapters) if len(kinds) == 1 else kinds,
        safety=chats_of(safety),
        general=chats_of(general),
        subspaces=subspaces or {},
        options=options or Options(),
    )
    evaluator = Evaluator(request, Path(output) if output else None, progress)
    evaluation = evaluator.run()
    if output:
        evaluation.save(output)
        evaluator.forget()
    return evaluation


class Evaluator:
    """One run of `evaluate`."""

    def __init__(
        self,
        request: EvaluationRequest,
        output: Path | None,
        progress: Progress | None,
        language_model: LanguageModel | None = None,
    ) -> None:
        """Continue what an unfinished run of the same request left beside ``output``.

        Args:
            request: what to evaluate.
            output: the file that the evaluation will be written to; None: nothing is kept of an interrupted run.
            progress: is called with whose replies are computed, how many batches are done, and how many there are.
            language_model: the request's aligned model, if it is loaded already.
        """
        self.request = request
        self.stages = Stages(output, request.identity) if output else None
        options = request.options
        self.benchmarks = Benchmarks(options.lm_eval) if options.lm_eval else None
        self.language_model = language_model or LanguageModel.open(
            request.model, options.loading, options.longest_reply
        )
        self._check_prompts()
        layout = request.subspace.provenance.experts
        self.speaker = Speaker(self.language_model, layout, self.stages, Counter(progress, self._batches()))

    def run(self) -> Evaluation:
        """Let every model reply to every prompt, and count."""
        adapters = tuple(map(self._adapter, range(len(self.request.adapters))))
        self.speaker.counter.tick("")
        return Evaluation(self.request.model, self.request.subspace.sha256, adapters)

    def forget(self) -> None:
        """Remove what an interrupted run would continue from."""
        if self.stages:
            self.stages.remove()

    def _adapter(self, number: int) -> AdapterEvaluation:
        adapter = self.request.adapters[number]
        prompts = self.request.prompts(number)
        replies: dict[str, Replies] = {
            MODEL: self._replies(MODEL, None, number),
            RAW: self._replies(f"{RAW} on {number}", adapter, number),
        }
        yardsticks = self._yardsticks(replies)
        rows = [
            _row(MODEL, "model", None, None, replies[MODEL], yardsticks, self._scores(MODEL, None)),
            _row(RAW, "raw", None, 0.0, replies[RAW], yardsticks, self._scores(f"{RAW} on {number}", adapter)),
        ]
        for name, policy in self.request.policies.items():
            rows += self._corrected(number, name, policy, yardsticks)
        return AdapterEvaluation(
            adapter.path.resolve().name,
            adapter.sha256,
            {kind: tuple(tuple(map(asdict, chat)) for chat in chats) for kind, chats in prompts.items()},
            tuple(rows),
            tuple(_comparisons(rows)),
        )

    def _corrected(self, number: int, name: str, policy: Policy, yardsticks: Mapping[str, Yardstick]) -> Iterator[Row]:
        """The rows of a policy and of plain scaling that changes the update as much."""
        adapter, subspace = self.request.adapters[number], self.request.subspace_of(name)
        try:
            aligned = self.request.model if policy.min_annihilation_ratio is not None else None
            fixed, report = correct(adapter, subspace, policy, aligned=aligned)
        except RefusedError as error:
            self.speaker.counter.done += 2 * self._batches_of(number)
            yield Row(name, "policy", name, None, str(error).removeprefix(f"{adapter.path}: "), {})
            return
        change = report.totals.relative_change
        key = f"policy {name} on {number}"
        said, scores = self._replies(key, fixed, number), self._scores(key, fixed)
        yield _row(name, "policy", name, change, said, yardsticks, scores)
        factor = max(0.0, 1 - change)
        uncovered = {"keep_uncovered": policy.keep_uncovered, "drop_uncovered": policy.drop_uncovered}
        scaled, report = correct(adapter, subspace, scaling_policy(factor, **uncovered))
        key = f"scaling as {name} on {number}"
        said, scores = self._replies(key, scaled, number), self._scores(key, scaled)
        change = report.totals.relative_change
        yield _row(f"scaling x{factor:.2f}", "scaling", name, change, said, yardsticks, scores)

    def _replies(self, name: str, adapter: Adapter | None, number: int) -> Replies:
        label = name.removesuffix(f" on {number}")
        if len(self.request.adapters) > 1:
            label += f", {self.request.adapters[number].path.name}"
        return {
            kind: self.speaker.replies(
                f"{name}: {kind}{f' of {number}' if kind == 'task' else ''}",
                f"{label}: {kind}",
                adapter,
                chats,
                self.request.options.judge if kind == "safety" else None,
            )
            for kind, chats in self.request.prompts(number).items()
        }

    def _scores(self, name: str, adapter: Adapter | None) -> Scores:
        """What lm-eval finds, if it is asked."""
        return self.speaker.scores(name, adapter, self.benchmarks) if self.benchmarks else {}

    def _yardsticks(self, replies: Mapping[str, Replies]) -> dict[str, Yardstick]:
        """What each kind's replies are compared with: the aligned model's, the raw adapter's, or both."""
        options, yardsticks = self.request.options, {}
        for kind in replies[MODEL]:
            references = replies[MODEL][kind], replies[RAW][kind]
            wanted = {"safety": references[:1], "task": references[1:], "general": references}[kind]
            yardsticks[kind] = Yardstick(wanted, perplexity_limit(references, options.incoherence), options.refusals)
        return yardsticks

    def _check_prompts(self) -> None:
        """Raise `InputError` now, and not after an hour's work, for a prompt that the model does not take."""
        every = (*self.request.task, self.request.safety, self.request.general)
        self.language_model.check_lengths([chat for chats in every for chat in chats])

    def _batches(self) -> int:
        rows = 2 + 2 * len(self.request.policies)
        return rows * sum(map(self._batches_of, range(len(self.request.adapters))))

    def _batches_of(self, number: int) -> int:
        batches = sum(-(-len(chats) // BATCH) for chats in self.request.prompts(number).values())
        return batches + (self.benchmarks is not None)


def _row(
    name: str,
    role: Role,
    policy: str | None,
    change: float | None,
    replies: Replies,
    yardsticks: Mapping[str, Yardstick],
    scores: Scores,
) -> Row:
    outcomes = {kind: tuple(yardsticks[kind].outcomes(said)) for kind, said in replies.items()}
    return Row(name, role, policy, change, None, outcomes, scores)


def _comparisons(rows: Sequence[Row]) -> Iterator[Comparison]:
    """Every policy beside the raw adapter and beside the scaling that changes as much."""
    raw = next(row for row in rows if row.role == "raw")
    for row in (row for row in rows if row.role == "policy" and row.refusal is None):
        scaled = next(each for each in rows if each.role == "scaling" and each.policy == row.policy)
        for other in (raw, scaled):
            for kind in row.outcomes:
                yield _compared(row, other, kind, "same")
                if row.outcomes[kind][0].refused is not None:
                    yield _compared(row, other, kind, "refused")
                if row.outcomes[kind][0].unsafe is not None:
                    yield _compared(row, other, kind, "unsafe")


def _compared(row: Row, other: Row, kind: str, what: Literal["same", "refused", "unsafe"]) -> Comparison:
    found = [[bool(getattr(each, what)) for each in one.outcomes[kind]] for one in (row, other)]
    return Comparison(row.name, other.name, other.role, kind, what, Paired.of(*found))
