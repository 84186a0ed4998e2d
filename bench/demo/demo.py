"""The story of csulora on a small model: an adapter learns a task and breaks refusals; then it is corrected.

    python bench/demo/demo.py [--out DIR] [--rank K]

Runs the real commands on the committed fixture, which `bench/efficacy/train.py` makes: extract, inspect, tune,
correct. Then plain PEFT loads every adapter, and a table compares their replies to held-out prompts.

`tune` gets 40 prompts of each kind. The probes that the table counts are other prompts, about other topics.
To save time `tune` runs 40 steps in place of 100, with one weight of the task prompts in place of three.

The rank decides what `protect` does. With `--rank 4` its infinite penalty stops the attack and keeps the task. That
was found with these very probes, so 4 is not the default. The rates illustrate the policies; they predict nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from csulora import controls

sys.path.insert(0, str(Path(__file__).parents[1] / "efficacy"))
import comparison
import evaluate
import world

FIXTURE = Path(__file__).parents[1] / "efficacy" / "fixture"
ADAPTER = FIXTURE / "adapter"
RANK = 16
TUNING = ("--steps", "40", "--task-weight", "8", "--tokens", "16")
PRESETS = ("csulora", "project", "protect")
INFINITE = ("protect", "--aligned", "inf", "--partial", "inf")


@dataclass(frozen=True)
class Corrections:
    """Directories of corrected adapters, by name.

    Attributes:
        untuned: by policies that need no prompts.
        fitted: by the best plain scaling that `tune` measured, and by the policy that it wrote.
    """

    untuned: dict[str, Path]
    fitted: dict[str, Path]


def shown_path(path: Path) -> str:
    """`path` as a user in the current directory would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def run(*arguments: str | Path) -> None:
    """Print a csulora command and run it; if it fails, so does the demo."""
    words = [shown_path(word) if isinstance(word, Path) else word for word in arguments]
    print(f"\n$ csulora {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "csulora", *words], check=True)


def correct(subspace: Path, directory: Path, policy: str | Path, *options: str) -> Path:
    """Correct the fixture's adapter into `directory`."""
    run("correct", ADAPTER, "--subspace", subspace, "--policy", policy, *options, "-o", directory, "--quiet")
    return directory


def tune(subspace: Path, policy: Path) -> None:
    """Fit a policy to the world's prompts, which are written beside it."""
    files: list[str | Path] = []
    for kind, prompts in vars(world.fit_prompts()).items():
        path = policy.with_name(f"{kind}.txt")
        path.write_text("".join(f"{prompt}\n" for prompt in prompts))
        files += [f"--{kind}", path]
    run("tune", FIXTURE / "aligned", ADAPTER, "--subspace", subspace, *files, *TUNING, "-o", policy)


def best_scaling(frontier: Path) -> float:
    """The factor of plain scaling that keeps most on the validation split, as `tune` chooses it."""
    points = [point for point in json.loads(frontier.read_text())["points"] if point["family"] == "scaling"]
    return 1 - float(max(points, key=lambda point: point["validation"]["value"])["relative_change"])


def run_commands(out: Path, rank: int) -> Corrections:
    """Extract, inspect, tune and correct into `out`."""
    subspace, policy = out / "subspace.safetensors", out / "tuned.toml"
    run("extract", FIXTURE / "base", FIXTURE / "aligned", "-o", subspace, "--rank", str(rank))
    run("inspect", ADAPTER, "--subspace", subspace)
    tune(subspace, policy)
    factor, scaling = best_scaling(policy.with_suffix(".frontier.json")), out / "scaling.toml"
    controls.scaling_policy(factor).save(scaling)
    infinite = out / "protect-infinite"
    return Corrections(
        {name: correct(subspace, out / name, name) for name in PRESETS}
        | {infinite.name: correct(subspace, infinite, *INFINITE)},
        {
            f"scaling x{factor:.2g}": correct(subspace, out / scaling.stem, scaling),
            policy.stem: correct(subspace, out / policy.stem, policy),
        },
    )


def ask(corrections: Corrections) -> list[comparison.Row]:
    """Put the probes to the aligned model, alone and with every adapter in plain PEFT."""
    corrected = {**corrections.untuned, **corrections.fitted}
    reports = [json.loads((directory / "csulora_report.json").read_text()) for directory in corrected.values()]
    totals = [report["totals"] for report in reports]
    changes = [comparison.Change.before(totals[0]), *map(comparison.Change.after, totals)]
    adapters = {comparison.UNCORRECTED: ADAPTER, **corrected}
    return list(map(comparison.Row, evaluate.examine_all(FIXTURE / "aligned", None, adapters), [None, *changes]))


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="directory to write to")
    parser.add_argument("--rank", type=int, default=RANK, help="directions per module (default: %(default)s)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    corrections = run_commands(out, arguments.rank)
    print("\nLoading the aligned model with every adapter in plain PEFT ...", flush=True)
    evaluate.quieten_libraries()
    rows = ask(corrections)
    # A pipe has no width of its own; wide enough that replies take few lines.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(evaluate.replies_table([row.subject for row in rows]), comparison.table(rows))
    for sentence in (
        *comparison.counts(world.probes()),
        *comparison.advice(rows, [*corrections.untuned], [*corrections.fitted], world.FIT_PROMPTS),
    ):
        console.print(sentence, markup=False, highlight=False)


if __name__ == "__main__":
    main()
