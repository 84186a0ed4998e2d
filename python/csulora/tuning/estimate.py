"""What a run will take, and what its prompts can show: what a user wants to know before it works for an hour."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch

from csulora.tuning.frontier import Point, Rate, Z
from csulora.tuning.probes import prompt_hash
from csulora.tuning.request import Request
from csulora.tuning.splits import STRIDE, Split

_LIKELY = 0.5  # what plain scaling keeps of both kinds where one of them goes as the other comes


def tested(request: Request) -> int:
    """Return on how many test prompts the kind with the fewest is counted; each counts once for each adapter."""
    counts = [sum(_test_count(request, number) for number in range(len(request.task)))]
    files = [request.safety, *([request.general] if request.general else [])]
    counts += [len(request.adapters) * len(request.splits.positions(chats, Split.test)) for chats in files]
    return min(counts)


def _test_count(request: Request, number: int) -> int:
    return len(request.splits.positions(request.task[number], Split.test))


def doubts_about_prompts(request: Request) -> Iterator[str]:
    """Say what is known of the prompts before anything is run."""
    counted = tested(request)
    best = Rate.of(counted, counted).low
    if best <= _LIKELY:
        yield (
            f"{counted} test prompts show little: if a policy kept all of them, its 95 % interval "
            f"would begin at {best:.2f}; {_advice(request, _LIKELY)}"
        )
    if seen := _seen_by_canary(request):
        yield f"the canary was made with {seen} of the test prompts; the report may flatter, so give it others"
    task = {prompt_hash(chat) for chats in request.task for chat in chats}
    if shared := len(task & set(map(prompt_hash, request.general))):
        yield f"{shared} prompts are both task and general prompts; each counts twice, in the same split of both files"


def _seen_by_canary(request: Request) -> int:
    """How many different test prompts the subspace file was made with, where that is a canary."""
    canary = request.subspace.provenance.canary
    if canary is None:
        return 0
    test = {prompt_hash(chat) for chats in request.files for chat in chats if request.splits.of(chat) is Split.test}
    return len(test.intersection((*canary.prompts, *canary.general_prompts)))


def doubt_about_verdict(request: Request, bar: Point) -> str | None:
    """Say whether the test prompts can show at all that a policy keeps more than plain scaling does."""
    counted, kept = tested(request), bar.choice.value
    if kept == 1:
        return f"plain scaling ({bar.policy}) keeps everything on the validation split; no policy can keep more"
    if Rate.of(counted, counted).low > kept:
        return None
    return (
        f"{counted} test prompts cannot show that a policy beats plain scaling if {bar.policy} keeps {kept:.2f} of "
        f"them, as on the validation split; {_advice(request, kept)}"
    )


def _advice(request: Request, kept: float) -> str:
    """How many prompts a file needs for the interval of a policy that keeps all to lie above ``kept``."""
    fewest = math.floor(Z * Z * kept / (1 - kept)) + 1
    each = STRIDE * math.ceil(fewest / len(request.adapters))
    return f"give {each} prompts or more in each file"


def duration(least: float, most: float) -> str:
    """Return a span of seconds in words.

    >>> duration(20, 50), duration(50, 290), duration(70, 80)
    ('less than a minute', '1 to 5 minutes', 'about 2 minutes')
    """
    low, high = math.ceil(least / 60), math.ceil(most / 60)
    if high == 1:
        return "less than a minute"
    return f"{low} to {high} minutes" if low < high else f"about {high} minutes"


def memory(device: torch.device) -> str:
    """Return the most memory that was used until now, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of the GPU's memory"
    if sys.platform == "win32":
        return "an unknown amount of memory"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory"
