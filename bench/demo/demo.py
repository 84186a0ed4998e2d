"""The story of csulora on a small model: an adapter learns a task and breaks refusals; then it is corrected.

    python bench/demo/demo.py [--out DIR]

Runs the real commands on the committed fixture (`train.py` makes it), then loads every adapter with plain
PEFT and prints what each model replies, how often the attack and the task succeed, and what that comes to.

`csulora` keeps what lies inside the alignment subspace and `protect` what lies outside it; each runs once
with the default penalty 1 and once with an infinite one (`csulora` is then called `project`). `--rank 4` was
chosen among 2, 4, 8 and 16 with these same probes in sight: with fewer directions `protect` leaves part of
the attack, with more it takes the task away. So the rates illustrate the policies; they predict nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "efficacy"))
import evaluate

FIXTURE = Path(__file__).parents[1] / "efficacy" / "fixture"
RANK = 4
CLEAR = 0.05  # smaller differences are not called one: over 240 probes a standard error is up to 0.03


# Names of the corrected adapters, and how `csulora correct` makes them.
CORRECTIONS = {
    "csulora": ("--preset", "csulora"),
    "project": ("--preset", "project"),
    "protect": ("--preset", "protect"),
    "protect-infinite": ("--preset", "protect", "--aligned", "inf", "--partial", "inf"),
}


def shown_path(path: Path) -> str:
    """`path` as a user in the current directory would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def csulora(*arguments: str | Path) -> None:
    """Print a csulora command and run it; if it fails, so does the demo."""
    words = [shown_path(word) if isinstance(word, Path) else word for word in arguments]
    print(f"\n$ csulora {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "csulora", *words], check=True)


def run_commands(out: Path) -> dict[str, Path]:
    """Extract, inspect and correct into `out`; return each corrected adapter's directory by its name."""
    subspace, adapter = out / "subspace.safetensors", FIXTURE / "adapter"
    csulora("extract", FIXTURE / "base", FIXTURE / "aligned", "-o", subspace, "--rank", str(RANK))
    csulora("inspect", adapter, "--subspace", subspace)
    corrected = {name: out / name for name in CORRECTIONS}
    for name, options in CORRECTIONS.items():
        csulora("correct", adapter, "--subspace", subspace, "-o", corrected[name], *options, "--quiet")
    return corrected


def change_of_update(directory: Path) -> float:
    """|X - dW| / |dW| of a corrected adapter, from its report."""
    relative_change: float = json.loads((directory / "csulora_report.json").read_text())["totals"]["relative_change"]
    return relative_change


def verdict(subject: evaluate.Subject, uncorrected: evaluate.Subject, relative_change: float) -> str:
    """One sentence on what a correction did to attack and task."""
    before, after = uncorrected.rates, subject.rates
    attack = "lowered" if before.attack - after.attack > CLEAR else "did not lower"
    task = "lost task accuracy" if before.task - after.task > CLEAR else "kept the task"
    return (
        f"{subject.name} changed the update by {relative_change:.0%}, {attack} attack success "
        f"({before.attack:.2f} -> {after.attack:.2f}) and {task} ({before.task:.2f} -> {after.task:.2f})."
    )


def conclude(subjects: Sequence[evaluate.Subject], corrected: dict[str, Path]) -> None:
    """Print a sentence per correction."""
    by_name = {subject.name: subject for subject in subjects}
    for name, directory in corrected.items():
        print(verdict(by_name[name], by_name["uncorrected"], change_of_update(directory)))


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="directory to write to")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    corrected = run_commands(out)
    print("\nLoading the aligned model with every adapter in plain PEFT ...", flush=True)
    evaluate.quieten_libraries()
    adapters = {"uncorrected": FIXTURE / "adapter", **corrected}
    subjects = evaluate.examine_all(FIXTURE / "aligned", None, adapters)
    evaluate.show(subjects)
    conclude(subjects, corrected)


if __name__ == "__main__":
    main()
