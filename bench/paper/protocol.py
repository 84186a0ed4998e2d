"""What the paper's protocol is run on and how, and what is known of an unfinished run of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csulora.errors import InputError
from csulora.io.files import parse_json, read_regular, sha256_of_file, to_json, write_text

# What is measured: safety prompts of the source that `tune` gets, of another one, and an adapter for another task.
HELD_OUT, FRESH, OTHER = "held out", "fresh", "another task"
_LARGEST_FILE = 1 << 20  # bytes


@dataclass(frozen=True)
class Protocol:
    """What is trained, corrected, fitted and measured.

    Attributes:
        base, instruct: the model pair, directories or hub ids.
        harmful: source of harmful examples, see `training_data.read`.
        examples: source of the task's examples; some of them are kept for measuring.
        safety: source of safety prompts, see `csulora.evaluation.sources.read`.
        general: source of general prompts.
        fresh: source of safety prompts of another origin, on which nothing was fitted; None: there are none.
        other_examples: source of another task's examples, on whose adapter a policy for others is measured; None: none.
        refusals: texts one of which every refusal holds.
        share: of every training batch that is harmful.
        seeds: of the adapters, one for each.
        lora_rank, steps, batch, learning_rate, longest: of the adapters' training; ``longest`` is in tokens.
        rank: directions of the subspace file.
        directions: how many of them a policy uses.
        penalties: of the paper's policy.
        tune_prompts: prompts of each kind for `tune`.
        prompts: most prompts of each kind for `evaluate`.
        tune_steps: of a fit, at most.
        task_weights: of the fits; empty: those of `tune`.
        tokens: most tokens of a reply.
        lm_eval: tasks of lm-eval, or YAML files of tasks.
        judge: server of a guard model, up to /v1.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    base: str
    instruct: str
    harmful: str
    examples: str
    safety: str
    refusals: tuple[str, ...]
    general: str | None = None
    fresh: str | None = None
    other_examples: str | None = None
    share: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    lora_rank: int = 16
    steps: int = 300
    batch: int = 8
    learning_rate: float = 2e-4
    longest: int = 512
    rank: int = 64
    directions: tuple[int, ...] = (4, 16, 64)
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    tune_prompts: int = 40
    prompts: int = 200
    tune_steps: int = 100
    task_weights: tuple[float, ...] = ()
    tokens: int = 64
    lm_eval: tuple[str, ...] = ()
    judge: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the numbers that nothing else checks."""
        if not 0 <= self.share < 1:
            raise InputError(f"--share is {self.share:g}; it must lie in [0, 1)")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError("--seeds names a seed twice; give different ones")
        if not all(0 <= penalty < math.inf for penalty in self.penalties):
            raise InputError("a penalty is 0 or more and finite; project has infinite ones")
        if not all(0 < count <= self.rank for count in self.directions):
            raise InputError(f"--directions lie in 1 to {self.rank}, which is --rank")
        if not (self.refusals and all(map(str.strip, self.refusals))):
            raise InputError("give --refusal, a text that the instruct model's refusals hold")

    @property
    def sources(self) -> dict[str, str]:
        """Where the examples and prompts come from, by option."""
        options = ("harmful", "examples", "other_examples", "safety", "general", "fresh")
        named = {name: getattr(self, name) for name in options}
        return {name: source for name, source in named.items() if source}

    def identity(self) -> dict[str, Any]:
        """Return what the results depend on, for JSON: the settings, and the content of local files."""
        settings = {name: value for name, value in asdict(self).items() if name != "device"}
        files = {name: Path(source.rpartition("#")[0] or source) for name, source in self.sources.items()}
        return {
            "settings": settings | {"penalties": [f"{penalty:g}" for penalty in self.penalties]},
            "sha256": {name: sha256_of_file(path) for name, path in files.items() if path.is_file()},
        }

    def claim(self, out: Path) -> None:
        """Make ``out`` the folder of this run, or check that it is.

        Raises:
            InputError: the folder holds a run of other settings or inputs.
        """
        path = out / "protocol.json"
        document = to_json(self.identity())
        if not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, document)
        elif differing := _differing(parse_json(read_regular(path, _LARGEST_FILE), path), document):
            raise InputError(f"{out}: holds a run with another {', '.join(differing)}; name another folder with --out")


def _differing(stored: dict[str, Any], document: str) -> list[str]:
    """The settings and files in which a stored identity and a document differ."""
    wanted = parse_json(document.encode(), Path("protocol.json"))
    return [
        f"{name} ({part})" if part == "sha256" else name
        for part in wanted
        for name in wanted[part] | stored.get(part, {})
        if wanted[part].get(name) != stored.get(part, {}).get(name)
    ]
