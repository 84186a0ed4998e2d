"""How long the parts of `csulora tune` take for one adapter of SmolLM2, beside an older tree.

    python bench/speed/tune_real.py --peer TREE [--out DIR] [--seed 0] [--repetitions 1]

`bench/efficacy/real_carry.py` makes the model, the adapter and the subspace file below ``--out``. Each tree's code runs
in a process of its own, in turn: it loads the model, takes all replies, measures one policy, and fits a few steps.
That gives the time of a run with the default options. Time is the processor's, since others may compute here. The peer
is any tree with a compiled core. What has run is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import save, summary, usage

import csulora
from csulora.tuning import probes
from csulora.tuning.experiment import Experiment
from csulora.tuning.loading import Loading
from csulora.tuning.measurement import Use
from csulora.tuning.options import Options
from csulora.tuning.recommendation import TUNED
from csulora.tuning.request import Request

ROOT = Path(__file__).resolve().parents[2]
MODEL, LONGEST = "smollm2", 12  # tokens of the replies that are looked at
KINDS = ("task", "safety", "general")
PROMPTS = 24  # of each kind; a half is a batch of a step
FEW, MANY = 1, 2  # steps
SCALINGS, PRESETS, WEIGHTS, CONTROLS = 10, 10, 3, 3  # that are measured, no scaling included; that are fitted


def parts(here: Path, adapter: Path) -> dict[str, float]:
    """The processor's seconds of each part of the code that this process imports."""
    prompts = {kind: probes.read(here / f"fitted-{kind}.jsonl")[:PROMPTS] for kind in KINDS}
    request = Request(
        str(here / "served"),
        [csulora.load_adapter(adapter)],
        csulora.Subspace.open(here / "subspace.safetensors"),
        task=[prompts["task"]],
        safety=prompts["safety"],
        general=prompts["general"],
        loading=Loading("cpu"),
        longest_reply=LONGEST,
    )
    experiment = Experiment(request, Path(tempfile.mkdtemp()) / "policy.toml")
    fitting, measurement, examples = experiment.fitting, experiment.measurement, experiment.examples
    measure = getattr(measurement, "measure", None) or getattr(measurement, "_measure")  # noqa: B009 - the peer's name
    _ = examples.language_model
    taken = {"start": time.process_time()}

    def timed(part: str, work: Any) -> None:
        begun = time.process_time()
        work()
        taken[part] = time.process_time() - begun

    timed("replies", lambda: (examples.replies, examples.general))
    for part in ("first measurement", "measurement"):
        timed(part, lambda: measure(Use(0, request.subspace, request.untuned)))
    for number, steps in enumerate((FEW, FEW, MANY)):  # the first prepares what all others use
        fitting.request = replace(request, options=replace(request.options, steps=steps))
        timed(f"fit {number}", lambda weight=2.0 + number: fitting.policy(experiment.families[TUNED], [0], weight))
    taken["step"] = (taken["fit 2"] - taken["fit 1"]) / (MANY - FEW)
    return taken


def run(tree: Path, here: Path, adapter: Path, threads: int) -> dict[str, float]:
    """The parts of one tree's code, in a process of its own, and the most memory in GB."""
    environment = {"PYTHONPATH": str(tree / "python"), "OMP_NUM_THREADS": str(threads)}
    command: list[str | Path] = [sys.executable, __file__, "--threads", str(threads), "--parts", here, adapter]
    used = usage(command, environment, keeps_output=True)
    if used.exit_code:
        raise SystemExit(f"{tree}: the parts of tune ended with exit code {used.exit_code}")
    found: dict[str, float] = json.loads(used.output.splitlines()[-1])
    return found | {"peak_gb": used.peak_gb}


def whole(taken: dict[str, dict[str, Any]], measurements: int, fits: int) -> float:
    """Seconds of a run with so many measurements and fits of the default length."""
    seconds = {part: found["median"] for part, found in taken.items()}
    fixed = seconds["start"] + seconds["replies"] + seconds["first measurement"]
    return float(fixed + measurements * seconds["measurement"] + fits * Options.steps * seconds["step"])


def document(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What all runs come to, with the default options too."""
    taken = {name: {part: summary([run[part] for run in every]) for part in every[0]} for name, every in runs.items()}
    default = {
        "peer": whole(taken["peer"], SCALINGS + PRESETS + WEIGHTS + CONTROLS, WEIGHTS + CONTROLS),
        "csulora, one weight": whole(taken["csulora"], SCALINGS + 2, 2),
        "csulora, all weights": whole(taken["csulora"], SCALINGS + PRESETS + WEIGHTS + 1, WEIGHTS + 1),
    }
    return {"cpu_seconds": taken, "default_options": default}


def models(out: Path, seed: int) -> tuple[Path, Path]:
    """Write the prompts; return the directory of the model and an adapter."""
    sys.path.insert(0, str(ROOT / "bench" / "efficacy"))
    import real_world
    from real_run import Run, write_prompts

    real = Run(out.resolve() / MODEL, MODEL, real_world.Deal(seed))
    write_prompts(real)
    return real.here, real.here / real.deal.styles[0]


def main() -> None:
    """Run what has not run, the trees in turn, and write times, memory and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, default=ROOT, help="an older tree, with a compiled core")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "efficacy-real", help="where the models are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs=2, type=Path, metavar=("MODELS", "ADAPTER"), help="what each process does")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.parts:
        print(json.dumps(parts(*arguments.parts)))
        return
    here, adapter = models(arguments.out, arguments.seed)
    trees = {"csulora": ROOT, "peer": arguments.peer.resolve()}
    kept = here / "tune-parts.json"
    runs: dict[str, list[dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for number, (name, tree) in itertools.product(range(arguments.repetitions), trees.items()):
        if len(runs.setdefault(name, [])) <= number:
            runs[name].append(run(tree, here, adapter, arguments.threads))
            kept.write_text(json.dumps(runs))
            print(name, runs[name][-1], flush=True)
    save("tune_smollm2", document(runs))


if __name__ == "__main__":
    main()
