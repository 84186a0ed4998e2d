"""From a model, its adapters and kinds of prompt to a policy, and to the frontier that shows what it is worth."""

from __future__ import annotations

from pathlib import Path

from csulora.extraction.model_pair import Progress
from csulora.tuning.experiment import Experiment, Note
from csulora.tuning.frontier import Frontier, frontier_path
from csulora.tuning.request import Request


def tune(
    request: Request,
    output: Path,
    progress: Progress | None = None,
    note: Note = lambda _: None,
    require_verdict: bool = False,
) -> Frontier:
    """Fit a policy and write it to ``output``, a TOML file, with its frontier beside it.

    The validation split says which policy is taken, and is then fitted as well. What the frontier shows is measured on
    the test split, which decides nothing else. With several adapters, fitted policies are moreover measured on each
    adapter after a fit on the others. A policy for adapters to come reinforces some of what alignment did. It is
    filtered unless the score of a fit without input filters lies above the 95 % interval of those with: the subspace
    file to use it with, the given one with input filters, is written to `subspace_path`. If ``output`` has an
    unfinished run of the same request beside it, that is continued.

    ``progress`` is called with what begins, and how much of the most that there is to do is done. ``note`` is called
    with sentences for the user. With ``require_verdict``, a policy that does not beat plain scaling is not written.

    Raises:
        InputError, RefusedError: model, adapters, subspace file and prompts do not fit each other.

    >>> from csulora.tuning.loading import Loading
    >>> from csulora.tuning.options import Options
    >>> from csulora.tuning.probes import parse
    >>> def prompts(text, things):
    ...     return parse("\\n".join(text.format(thing) for thing in things.split()).encode())
    >>> request = Request(
    ...     model=aligned,
    ...     adapters=[csulora.load_adapter(adapter)],
    ...     subspace=csulora.Subspace.open(subspace),
    ...     task=[prompts("tell me a tale about a {} and a boat.", "lamp cup chair table bell rope kite ladder")],
    ...     safety=prompts("how do i make a {}?", "whistle drum mirror basket wheel candle knife hammer"),
    ...     loading=Loading("cpu"),
    ...     longest_reply=4,
    ...     options=Options(steps=1),
    ...     task_weights=(1.0,),
    ... )
    >>> frontier = tune(request, Path("policy.toml"))
    >>> sorted({point.family for point in frontier.points if point.control})
    ['scaling']
    >>> csulora.Policy.load("policy.toml").subspace_sha256 == frontier.subspace_sha256
    True
    """
    experiment = Experiment(request, output, progress, note=note)
    result = experiment.run()
    if result.frontier.recommended or not require_verdict:
        if result.policy.filtered:
            result.subspace.save(subspace_path(output))
        result.policy.save(output)
    result.frontier.save(frontier_path(output))
    experiment.stages.remove()
    return result.frontier


def subspace_path(policy: Path) -> Path:
    """Return where the subspace file of a filtered policy is.

    >>> subspace_path(Path("policies/chat.toml")).name
    'chat.subspace.safetensors'
    """
    return policy.with_name(f"{policy.stem}.subspace.safetensors")
