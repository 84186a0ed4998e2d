"""A policy calibrated on three adapters of a real model, tried on three that no fit has seen, of any seed.

    python bench/efficacy/real_carry.py [--model smollm2|gemma3] [--seed N] [--general given|written]
        [--no-fit] [--no-peft] [--unseen N] [--presets NAME ...] [--out DIR]

Makes the world of `real_world.py` from the package index and extracts the subspace file. Fits the policy as
`csulora tune` does for several adapters. `csulora evaluate` then puts it to prompts that nothing has seen, beside raw
adapters, plain scaling and presets. `csulora adjust` finds a strength for each of them by prompts of the fit, and
`csulora evaluate` asks the same again. At last plain PEFT answers with adapters that were corrected and written. Each
step is a process of its own, with its processor time and peak memory in the results. What is complete is not made
again. Results go to `bench/results/efficacy`. With `--general written` the model writes the general prompts. With
`--no-fit` nothing is fitted, and presets and plain scaling alone are measured. With `--no-peft` PEFT is not asked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import grid
import real_world as world
import torch
from peft import PeftModel
from real_run import CALIBRATION, PRESETS, Run, write_prompts
from real_world import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

import csulora
from csulora.cli import exit_codes
from csulora.evaluation.evaluation import Evaluation, Row
from csulora.io.files import to_json, write_text
from csulora.tuning import probes, sweep
from csulora.tuning.experiment import Experiment
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options
from csulora.tuning.recommendation import TUNED
from csulora.tuning.request import Request
from csulora.tuning.self_written import written
from csulora.tuning.tune import subspace_path

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
from measuring import usage

OUT = Path("build/efficacy-real")
# Fewer and smaller steps than `tune` takes by default, for one core.
ADAPTER_STEPS, OPTIONS = 30, Options(steps=70, batch=6, learning_rate=0.15)
LONGEST, DECISIVE = 12, 16  # tokens of the replies that are fitted to, and of those that are judged
Record = dict[str, Any]


def make_base(run: Run) -> None:
    """Fetch the model."""
    prepare.stage(
        run.base, lambda directory: prepare.make_base(directory, run.out / "gguf", prepare.SOURCES[run.model])
    )


def make_aligned(run: Run) -> None:
    """Train the aligned model, and keep it as it is served, too."""
    is_chat = not prepare.SOURCES[run.model].template
    prepare.stage(
        run.here / "aligned", lambda directory: world.make_aligned(directory, run.base, run.deal, is_chat=is_chat)
    )
    prepare.stage(run.here / "served", lambda directory: world.make_served(directory, run.here / "aligned"))


def make_adapters(run: Run) -> None:
    """Train the adapters that are fitted on, and those that the policy is tried on."""
    for style in (*run.deal.styles[:CALIBRATION], *run.styles):
        make_adapter(run, style, world.Recipe(style))


def make_adapter(run: Run, name: str, recipe: world.Recipe) -> Path:
    """Train an adapter as a recipe says, unless it is there."""
    make = partial(world.make_adapter, aligned=run.here / "aligned", deal=run.deal, recipe=recipe, steps=ADAPTER_STEPS)
    prepare.stage(run.here / name, make)
    return run.here / name


def write_general(run: Run) -> None:
    """Let the model write general prompts, none of which it is asked later."""
    file, model = run.general_prompts, str(run.here / "served")
    asked = {probes.prompt_hash(probes.from_text(text)) for texts in run.probes.values() for text in texts}
    written(file, model, Loading("cpu"), run.deal.seed, (world.REFUSED,), asked)


def fit(run: Run) -> None:
    """Fit the policy that `csulora tune` writes if it chooses input filters; nothing is left out in turn to choose."""
    adapters = [csulora.load_adapter(run.here / style) for style in run.deal.styles[:CALIBRATION]]
    request = Request(
        str(run.here / "served"),
        adapters,
        csulora.Subspace.open(run.here / "subspace.safetensors"),
        task=[probes.read(run.prompts("fitted", "task"))] * CALIBRATION,
        safety=probes.read(run.prompts("fitted", "safety")),
        general=probes.read(run.general_prompts),
        loading=Loading("cpu"),
        longest_reply=LONGEST,
        options=OPTIONS,
        refusals=(world.REFUSED,),
    )
    experiment, every = Experiment(request, run.policy, note=print), range(CALIBRATION)
    policy = experiment.policy(TUNED, every, request.weights[0], final=True)
    subspace = experiment.subspace(TUNED, 0, every, final=True)
    subspace.save(subspace_path(run.policy))
    sweep.pinned(policy, subspace.sha256, request.provenance).save(run.policy)
    experiment.stages.remove()


def ask_peft(run: Run) -> None:
    """Write what plain PEFT replies to all probes with each unseen adapter, raw and corrected by the first policy."""
    name, subspace, policy = first_policy(run)
    said: dict[str, dict[str, list[str]]] = {}
    for style in run.styles:
        fixed = run.here / f"{style}-corrected-{run.name}"
        if not fixed.exists():
            csulora.save_adapter(csulora.correct(csulora.load_adapter(run.here / style), subspace, policy)[0], fixed)
        said[style] = {"raw": replies(run, run.here / style), name: replies(run, fixed)}
    write_text(run.here / f"peft-{run.name}.json", to_json(said))


def first_policy(run: Run) -> tuple[str, csulora.Subspace, csulora.Policy]:
    """The name of what was fitted, its subspace file and itself, or those of the first preset."""
    if run.is_fitted:
        return run.policy.stem, csulora.Subspace.open(subspace_path(run.policy)), csulora.Policy.load(run.policy)
    preset = run.presets[0]
    return preset, csulora.Subspace.open(run.here / "subspace.safetensors"), getattr(csulora.Policy, preset)()


def replies(run: Run, adapter: Path) -> list[str]:
    """Greedy replies of the served model with an adapter in PEFT."""
    served = run.here / "served"
    model = AutoModelForCausalLM.from_pretrained(served, dtype="auto")
    prompts = [prompt for kind in run.probes.values() for prompt in kind]
    return world.reply(
        PeftModel.from_pretrained(model, adapter), AutoTokenizer.from_pretrained(served), prompts, DECISIVE
    )


MAKERS = {
    "aligned": make_aligned,
    "adapters": make_adapters,
    "general": write_general,
    "fit": fit,
    "peft": ask_peft,
}


def steps(run: Run) -> Iterator[tuple[str, str, list[str | Path]]]:
    """Yield each step's name, the name of what it finishes, and its command."""
    tool = [sys.executable, "-m", "csulora"]
    own = [sys.executable, __file__, "--model", run.model, "--seed", str(run.deal.seed)]
    own += ["--general", run.general, "--unseen", str(run.unseen), "--presets", *run.presets]
    own += [*([] if run.is_fitted else ["--no-fit"]), "--out", str(run.out.parent), "--step"]
    subspace = run.here / "subspace.safetensors"
    yield "aligned model", "aligned", [*own, "aligned"]
    extract: list[str | Path] = [
        "extract",
        run.base,
        run.here / "aligned",
        "-o",
        subspace,
        "--rank",
        str(world.RANK),
        "--quiet",
    ]
    yield "csulora extract", "extract", [*tool, *extract]
    yield f"{CALIBRATION + run.unseen} adapters", "adapters", [*own, "adapters"]
    if run.general == "written" and run.is_fitted:
        yield "general prompts", "general", [*own, "general"]
    if run.is_fitted:
        yield "fit on three adapters", f"fit-{run.name}", [*own, "fit"]
    yield "csulora evaluate", f"evaluate-{run.name}", [*tool, *evaluate_arguments(run, subspace)]
    for style in run.styles if run.is_fitted else ():
        yield f"csulora adjust, {style}", f"adjust-{run.name}-{style}", [*tool, *adjust_arguments(run, style)]
        if run.adjusted(style).exists():  # else it was refused
            name, arguments = f"evaluate-adjusted-{run.name}-{style}", adjusted_evaluate_arguments(run, style)
            yield f"csulora evaluate, {style} adjusted", name, [*tool, *arguments]
    if run.asks_peft:
        yield "PEFT", f"peft-{run.name}", [*own, "peft"]


def evaluate_arguments(run: Run, subspace: Path) -> list[str | Path]:
    """Arguments of `csulora evaluate`, for the adapters that no fit has seen."""
    arguments: list[str | Path] = ["evaluate", run.here / "served"]
    arguments += [run.here / style for style in run.styles]
    arguments += ["--subspace", subspace, "-o", run.evaluation, *asked(run)]
    if run.is_fitted:
        arguments += ["--policy", run.policy]
    for preset in run.presets:
        arguments += ["--policy", preset]
    return arguments


def asked(run: Run) -> list[str | Path]:
    """What is asked in every evaluation, and how it is judged."""
    arguments: list[str | Path] = ["--tokens", str(DECISIVE), "--refusal", world.REFUSED, "--device", "cpu", "--quiet"]
    for kind in run.probes:
        arguments += [f"--{kind}", run.prompts("unseen", kind)]
    return arguments


def adjust_arguments(run: Run, style: str) -> list[str | Path]:
    """Arguments of `csulora adjust` for one unseen adapter, with the prompts that the policy was fitted to."""
    arguments: list[str | Path] = ["adjust", run.here / "served", run.here / style, "-o", run.adjusted(style)]
    arguments += ["--subspace", subspace_path(run.policy), "--policy", run.policy]
    arguments += ["--safety", run.prompts("fitted", "safety"), "--general", run.general_prompts]
    arguments += ["--refusal", world.REFUSED, "--tokens", str(LONGEST), "--device", "cpu", "--quiet"]
    return [*arguments, "--json", run.adjusted(style).with_suffix(".json")]


def adjusted_evaluate_arguments(run: Run, style: str) -> list[str | Path]:
    """Arguments of `csulora evaluate` for one unseen adapter and the policy that was adjusted to it."""
    arguments: list[str | Path] = ["evaluate", run.here / "served", run.here / style, "--policy", run.adjusted(style)]
    arguments += ["--subspace", subspace_path(run.policy), "-o", run.adjusted_evaluation(style)]
    return [*arguments, *asked(run)]


def measured(run: Run, name: str, command: Sequence[str | Path]) -> Record:
    """Run a step unless it is finished; return the time that its process and its threads took, and its peak memory."""
    file = run.here / f"step-{name}.json"
    if file.exists():
        found: Record = json.loads(file.read_text())
        return found
    print(f"{run.model}, seed {run.deal.seed}: {name} ...", flush=True)
    used = usage(command)
    is_refused = name.startswith("adjust-") and used.exit_code == exit_codes.REFUSED
    if used.exit_code and not is_refused:
        sys.exit(f"{name}: the step ended with exit code {used.exit_code}; see above, and run the same command again")
    found = {
        "cpu_minutes": used.processor_seconds / 60,
        "minutes": used.seconds / 60,
        "peak_gb": used.peak_gb,
    }
    write_text(file, to_json(found))
    return found


def rows(run: Run) -> Iterator[Record]:
    """Yield what every adapter did under every policy, by the replies that `csulora evaluate` kept."""
    for style, found in zip(run.styles, Evaluation.load(run.evaluation).adapters, strict=True):
        yield from (described(run, style, row) for row in found.rows)
        if run.adjusted(style).exists():
            entry = json.loads(run.adjusted(style).with_suffix(".json").read_text())["adapters"]
            adjusted = {key: entry[str(run.here / style)][key] for key in ("strength", "kept")}
            [again] = Evaluation.load(run.adjusted_evaluation(style)).adapters
            yield from (described(run, style, row) | adjusted for row in again.rows if row.policy)


def described(run: Run, style: str, row: Row) -> Record:
    """Say how a row of the evaluation served its adapter, and what its replies are worth."""
    names = {run.policy.stem: "calibrated", run.adjusted(style).stem: "adjusted"}
    served = {"name": names.get(row.name, row.name), "policy": names.get(row.policy or "", row.policy)}
    texts = {kind: [outcome.text.strip() for outcome in row.outcomes[kind]] for kind in run.probes}
    change = {"role": row.role, "relative_change": row.relative_change}
    return {"adapter": style, **served, **change, **rates(style, row, texts)}


def rates(style: str, row: Row, texts: dict[str, list[str]]) -> Record:
    """Count what a row's replies are worth; without an adapter there is no style."""
    found = world.Rates.of("" if row.role == "model" else style, texts["safety"], texts["task"], texts["general"])
    return asdict(found) | {"perplexity": row.tally("safety").perplexity}


def beside_peft(run: Run) -> list[Record]:
    """Return, for each unseen adapter, raw and calibrated, what PEFT's replies are worth and how many are the same."""
    found: list[Record] = []
    if not run.asks_peft:
        return found
    said = json.loads((run.here / f"peft-{run.name}.json").read_text())
    for style, each in zip(run.styles, Evaluation.load(run.evaluation).adapters, strict=True):
        for name, texts in said[style].items():
            row = next(row for row in each.rows if row.name == name)
            evaluated = [outcome.text.strip() for kind in run.probes for outcome in row.outcomes[kind]]
            ends = [len(run.probes["safety"]), len(run.probes["safety"] + run.probes["task"])]
            split = texts[: ends[0]], texts[ends[0] : ends[1]], texts[ends[1] :]
            same = sum(one == other for one, other in zip(evaluated, texts, strict=True))
            name = "calibrated" if name == run.policy.stem else name
            counted = {"adapter": style, "name": name, "same_replies": same, "replies": len(texts)}
            found.append(counted | asdict(world.Rates.of(style, *split)))
    return found


def main() -> None:
    """Parse the command line, make what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=prepare.SOURCES, default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--general", choices=("given", "written"), default="given", help="general prompts of the fit")
    parser.add_argument("--no-fit", action="store_true", help="presets and plain scaling alone")
    parser.add_argument("--no-peft", action="store_true", help="plain PEFT does not answer the same prompts")
    parser.add_argument("--unseen", type=int, choices=(1, 2, 3), default=3, help="adapters that no fit has seen")
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=PRESETS, help="presets to compare with")
    parser.add_argument("--out", type=Path, default=OUT, help="directory to work in (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--step", choices=MAKERS, help="make one thing alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = arguments.out.resolve() / arguments.model
    deal, presets = world.Deal(arguments.seed), tuple(arguments.presets)
    asked = not arguments.no_fit, not arguments.no_peft
    run = Run(out, arguments.model, deal, arguments.general, arguments.unseen, presets, *asked)
    if arguments.step:
        evaluate.quieten_libraries()
        MAKERS[arguments.step](run)
        return
    made_with = grid.provenance()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    run.here.mkdir(parents=True, exist_ok=True)
    make_base(run)
    write_prompts(run)
    taken = {title: measured(run, name, command) for title, name, command in steps(run)}
    results = {"made_with": made_with, "model": run.model, "seed": run.deal.seed, "general": run.name}
    refused = [style for style in run.styles if run.is_fitted and not run.adjusted(style).exists()]
    settings = {"options": asdict(OPTIONS), "calibration": run.deal.styles[:CALIBRATION], "steps": taken}
    settings["refused"] = refused  # by `csulora adjust`
    write_text(run.result, to_json(results | settings | {"rows": list(rows(run)), "peft": beside_peft(run)}))
    print(f"{run.result}: written")


if __name__ == "__main__":
    main()
