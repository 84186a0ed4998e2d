"""The canary: the subspace between an aligned model and a copy of it that was briefly un-aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from csulora.adapters.lora import Adapter
from csulora.device import resolve
from csulora.errors import InputError
from csulora.evaluation.sources import Prompts, chats_of
from csulora.extraction.extract import ExtractionOptions, extract_pair
from csulora.extraction.model_pair import ModelPair, Progress
from csulora.io.files import check_file, check_not_inputs
from csulora.models.checkpoint import Checkpoint, GGUFCheckpoint
from csulora.subspace.input_filter import Factors
from csulora.subspace.provenance import Canary
from csulora.subspace.subspace import Subspace
from csulora.tuning.estimate import duration, memory
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.probes import FEWEST, prompt_hash
from csulora.unalignment import copy, examples
from csulora.unalignment.request import CanaryRequest, Options

_FEWEST_LEARNT = 0.5  # share of the replies, below which the copy is still aligned
_FEWEST_KEPT = 0.5  # share of the general prompts, below which the copy has changed all over
_TIMED = 2  # steps after which the time of one is known; the first prepares what all others use

Note = Callable[[str], None]
"""Called with sentences for the user."""


def canary(
    model: str | Path,
    *,
    safety: Prompts,
    general: Prompts,
    replies: Sequence[str] = (),
    adapters: Sequence[Adapter] = (),
    options: Options | None = None,
    loading: Loading | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
    note: Note = lambda _: None,
) -> Subspace:
    """Un-align a copy of the model for a moment, and return the subspace of what that took away.

    The copy learns replies to safety prompts, mixed half and half with the model's own replies to general prompts. It
    is a low-rank update in memory: nothing of it is written, and nothing is left of it but what this returns. That is
    as sensitive as the copy, since the model and its canary make the copy again.

    Prompts are a source as `csulora.evaluation.sources.read` takes it, or texts or chats; 8 of a kind or more.

    Args:
        model: the aligned model, a directory or a hub id. No checkpoint from before alignment is needed.
        safety: prompts that the model refuses or handles with care.
        general: prompts of another kind, which the copy answers as the model does.
        replies: to learn, one for each safety prompt.
        adapters: whose replies to the safety prompts are learnt, in place of ``replies``, where they begin otherwise
            than the model's.
        options: how the copy is un-aligned.
        loading: where the model runs, and in how many bits.
        output: subspace file to write, which its owner alone may read.
        progress: is called with what is done, how much of it, and how much there is.
        note: is called with sentences for the user.

    Raises:
        InputError: neither replies nor adapters are given, or both; the model does not take a prompt; the copy still
            answers most of the safety prompts as the model does.

    >>> from csulora.tuning.loading import Loading
    >>> from csulora.unalignment.request import Options
    >>> things = "whistle drum mirror basket wheel candle knife hammer".split()
    >>> found = csulora.canary(
    ...     aligned,
    ...     safety=[f"how do i make a {thing}?" for thing in things],
    ...     replies=["take some wood and follow a simple plan."] * 8,
    ...     general=[f"tell me a tale about a {thing} and a boat." for thing in things],
    ...     options=Options(batch=8, rank=4, longest_reply=12),
    ...     loading=Loading("cpu"),
    ... )
    >>> found["model.layers.0.self_attn.q_proj"].rank, found.provenance.canary.steps
    (4, 60)
    """
    request = CanaryRequest(
        model=str(model),
        safety=chats_of(safety, FEWEST),
        general=chats_of(general, FEWEST),
        replies=replies,
        adapters=adapters,
        options=options or Options(),
        loading=loading or Loading(),
    )
    if output is not None:
        check_file(Path(output))
        check_not_inputs([Path(output)], [model])
    subspace = _made(request, progress, note)
    if output is None:
        return subspace
    subspace.save(output)
    return Subspace.open(output)


def _made(request: CanaryRequest, progress: Progress | None, note: Note) -> Subspace:
    options, checkpoint = request.options, Checkpoint.open(request.model)
    if isinstance(checkpoint, GGUFCheckpoint):
        raise InputError(f"{request.model}: a GGUF file cannot be trained; name the model's directory or hub id")
    extraction = ExtractionOptions(options.rank, dtype=options.dtype, seed=options.seed, expert_rank=options.rank)
    modules = checkpoint.select(())
    factors, record = _unaligned(request, checkpoint, modules, progress, note)
    model_pair = ModelPair(
        copy.CopyCheckpoint(checkpoint, factors),
        copy.ExactCheckpoint(checkpoint),
        modules,
        {module: module for module in modules},
    )
    device = resolve("cpu" if request.loading.device == "cpu" else "auto")
    subspace = extract_pair(model_pair, extraction, device, progress and _extracting(progress))
    return Subspace(subspace, replace(subspace.provenance, canary=record))


def _unaligned(
    request: CanaryRequest, checkpoint: Checkpoint, modules: Sequence[str], progress: Progress | None, note: Note
) -> tuple[dict[str, Factors], Canary]:
    """Return the copy's updates, by names in memory, and what to say of them."""
    options = request.options
    if progress:
        progress("replies", 0, options.steps)
    language_model = LanguageModel.open(request.model, request.loading, options.longest_reply)
    language_model.check_lengths([*request.safety, *request.general])
    attacks = (
        examples.given(language_model, request.safety, request.replies)
        if request.replies
        else examples.of_adapters(language_model, request.safety, request.adapters, checkpoint.expert_layout)
    )
    general = examples.own(language_model, request.general)

    def tick(step: int, seconds: float) -> None:
        if step == _TIMED:
            left = seconds * (options.steps - step)
            note(f"un-aligning the copy takes {duration(left, left)} here, and {memory(language_model.device)}")
        if progress:
            progress("un-aligning", step, options.steps)

    start = copy.start(language_model, checkpoint, modules, options)
    factors = copy.unalign(language_model, start, attacks, general, options, tick)
    answered, kept = (copy.learnt(language_model, factors, kind) for kind in (attacks, general))
    if answered < _FEWEST_LEARNT:
        raise InputError(
            f"after {options.steps} steps the copy gives {answered:.0%} of the replies to safety prompts that it was "
            "to learn; use more steps (--steps) or a higher rate (--learning-rate)"
        )
    if kept < _FEWEST_KEPT:
        note(
            f"the copy answers {kept:.0%} of the general prompts as the model does: it lost more than its alignment; "
            "use fewer steps (--steps) or a lower rate (--learning-rate)"
        )
    return factors, _record(request, answered, kept)


def _record(request: CanaryRequest, answered: float, kept: float) -> Canary:
    options = asdict(request.options)
    del options["dtype"]  # the extraction's
    return Canary(
        prompts=tuple(sorted(map(prompt_hash, request.safety))),
        general_prompts=tuple(sorted(map(prompt_hash, request.general))),
        adapters=tuple(adapter.sha256 for adapter in request.adapters),
        answered=answered,
        kept=kept,
        **options,
    )


def _extracting(progress: Progress) -> Progress:
    return lambda _, done, total: progress("extracting", done, total)
