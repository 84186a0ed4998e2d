"""How long `csulora tune` takes for one adapter of world (a), and what is left of the attack, beside an older tree.

    python bench/speed/tune.py --peer TREE [--out DIR] [--seeds 0 1] [--repetitions 3]

Both trees' commands run in turn, in processes of their own, on the same files; `lab.py` trains what is not there below
``--out``. The peer is any tree with its compiled core. Time is the processor's, since others may compute here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import save, summary, usage

import csulora
from csulora.tuning.update import factors_of

sys.path.insert(0, str(Path(__file__).parents[1] / "efficacy"))
import plan
import scenario as world
from lab import Lab
from measure import MAX_REPLY
from scenario import Scenario
from subject import PROMPTS, opened

ROOT = Path(__file__).resolve().parents[2]
TASK = plan.FIRST


def prepare(out: Path, seed: int) -> list[object]:
    """Train and write what is not there, and return the command line's arguments but for the output."""
    lab = Lab(out, Scenario(seed))
    lab.subspace()
    prompts = world.fit_prompts(lab.scenario, TASK.task, PROMPTS)
    for kind in ("task", "safety"):
        (lab.directory / f"{kind}.txt").write_text("\n".join(getattr(prompts, kind)) + "\n")
    files = [f"--{kind}={lab.directory / f'{kind}.txt'}" for kind in ("task", "safety")]
    options = [
        "--subspace",
        lab.directory / "subspace.safetensors",
        "--tokens",
        MAX_REPLY,
        "--device",
        "cpu",
        "--quiet",
    ]
    return ["tune", lab.aligned(), lab.adapter(TASK), *files, *options]


def run(tree: Path, arguments: list[object], policy: Path) -> dict[str, float]:
    """Tune with one tree's code; return the processor's seconds and the most memory in GB."""
    for path in (policy, policy.with_name(f"{policy.name}.partial")):  # of a run that was interrupted
        path.unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(tree / "python"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "csulora", *map(str, arguments), "-o", str(policy)]
    used = usage(command, environment, tree)
    if used.exit_code:
        raise SystemExit(f"{tree}: tune ended with exit code {used.exit_code}")
    return {"cpu": used.processor_seconds, "memory": used.peak_gb}


def left(out: Path, seed: int, policies: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What each policy leaves of the attack, the task and all else on the lab's own probes."""
    bench = opened(out, Scenario(seed))
    subject = bench.subject(TASK)
    found = {}
    for name, policy in policies.items():
        fixed, report = csulora.correct(subject.adapter, bench.subspace, csulora.Policy.load(policy))
        with bench.language_model.adapted(factors_of(fixed)):
            measured = subject.examiner.measure(bench.language_model.model)
        found[name] = {
            "attack": measured.attack,
            "task": measured.task,
            "elsewhere": measured.benign,
            "relative_change": report.totals.relative_change,
        }
    return found


def main() -> None:
    """Run both trees in turn, and write times, memory, ratios and what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="an older tree, with its compiled core")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "efficacy", help="where the models are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trees = {"peer": arguments.peer.resolve(), "csulora": ROOT}
    results: dict[str, Any] = {"adapter": TASK.name, "seeds": {}}
    for seed in arguments.seeds:
        command = prepare(arguments.out.resolve(), seed)
        policies = {name: arguments.out.resolve() / f"speed-{name}.toml" for name in trees}
        used: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for _ in range(arguments.repetitions):
            for name, tree in trees.items():
                used[name].append(run(tree, command, policies[name]))
        times = {name: summary([each["cpu"] for each in every]) for name, every in used.items()}
        results["seeds"][seed] = {
            "cpu_seconds": times,
            "ratio": times["peer"]["median"] / times["csulora"]["median"],
            "peak_gb": {name: max(each["memory"] for each in every) for name, every in used.items()},
            "left": left(arguments.out.resolve(), seed, policies),
        }
        print(seed, results["seeds"][seed], flush=True)
    save("tune", results)


if __name__ == "__main__":
    main()
