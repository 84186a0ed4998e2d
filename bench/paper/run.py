"""The protocol of CSULoRA's paper (arXiv 2605.30640) from a model pair to one table and an Acceptance Card.

    python bench/paper/run.py --base ID --instruct ID --harmful FILE --examples SOURCE --safety SOURCE --refusal TEXT
        [--general SOURCE] [--fresh SOURCE] [--other-examples SOURCE] [--lm-eval TASK ...] [--out DIR] [--dry-run]

Extracts the model pair's subspaces. Trains a LoRA adapter per seed on a task's examples with harmful ones among them.
Corrects it with the paper's policy over penalties and numbers of directions, with other presets, and with controls.
Fits a policy with `tune`. Measures all of them with `evaluate` on prompts that neither training nor `tune` has seen.
Carries a policy that was fitted on these adapters to one for another task, where such examples are given.
Writes `results.json`, `table.md` and `card.md`.

Harmful examples are the operator's own; none are bundled. The same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1] / "efficacy"))
sys.path.insert(0, str(Path(__file__).parents[1] / "real_model"))
import card
import cards
import evaluate
import grid
import plan_of_run
import table
import training_data
from protocol import Protocol
from stages import Run

from csulora import CsuloraError
from csulora.io.files import to_json, write_text

OUT = Path("build/paper")
_HELP = {
    "base": "the checkpoint before alignment, a directory or a hub id",
    "instruct": "the aligned model, a directory or a hub id",
    "harmful": "harmful examples of your own: JSON lines of chats that end with a reply, or TABLE#PROMPT,REPLY",
    "examples": "the task's examples, likewise; some are held out to measure the task",
    "safety": "safety prompts, as `csulora evaluate` reads them",
    "general": "general prompts, likewise",
    "other_examples": "another task's examples; a policy for others is measured on an adapter for it",
    "fresh": "safety prompts of another origin, on which nothing is fitted",
    "refusals": "a text that the instruct model's refusals hold; repeatable",
    "share": "share of the harmful examples in training",
    "seeds": "one adapter is trained for each",
    "lora_rank": "rank of the adapters",
    "steps": "training steps of an adapter",
    "batch": "examples in a training step",
    "learning_rate": "the highest of a training",
    "longest": "most tokens of an example; what lies before is cut off",
    "rank": "directions of the subspace file",
    "directions": "numbers of directions that policies use",
    "penalties": "penalties of the paper's policy",
    "tune_prompts": "prompts of each kind for `tune`",
    "tune_steps": "most steps of a fit of `tune`",
    "task_weights": "weights of the task prompts in fits (default: those of `tune`)",
    "tokens": "most tokens of a reply",
    "prompts": "most prompts of each kind that are measured",
    "lm_eval": "tasks of lm-eval, or YAML files of tasks",
    "judge": "server of a guard model, up to /v1",
    "device": "auto, cpu or cuda",
}


def parser() -> argparse.ArgumentParser:
    """The command line: an option for every setting of `Protocol`."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = get_type_hints(Protocol)
    for field in fields(Protocol):
        required = field.default is MISSING
        shape: dict[str, Any] = {"required": True} if required else {"default": field.default}
        several = get_args(types[field.name]) if get_origin(types[field.name]) is tuple else ()
        if field.name == "refusals":
            shape["action"] = "append"
        elif several:
            shape |= {"nargs": "+", "type": several[0]}
        elif types[field.name] in (int, float):
            shape["type"] = types[field.name]
        option = f"--{field.name.replace('_', '-').replace('refusals', 'refusal')}"
        made.add_argument(option, dest=field.name, help=_HELP[field.name] + _shown(shape.get("default")), **shape)
    made.add_argument("--out", type=Path, default=OUT, help="folder of the run (default: %(default)s)")
    made.add_argument("--dry-run", action="store_true", help="print what would be done, with estimates, and stop")
    return made


def _shown(default: object) -> str:
    """A default in an option's help, where it says something."""
    if not default:
        return ""
    values = default if isinstance(default, tuple) else (default,)
    return f" (default: {' '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)})"


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """Return the settings that a command line gives."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Protocol)}
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return Protocol(**settings)


def run(protocol: Protocol, out: Path, command: str) -> str:
    """Finish the run and write its results, table and card; return the table."""
    made_with = grid.provenance()
    unfinished = Run(protocol, out)
    unfinished.finish()
    results = {"made_with": made_with, "command": command, **unfinished.records()}
    write_text(out / "results.json", to_json(results))
    text = table.markdown(results)
    write_text(out / "table.md", text)
    write_text(out / "card.md", card.markdown(cards.of_paper(results)))
    return text


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line and run, or say what a run would do."""
    arguments = parser().parse_args(words)
    command = shlex.join(["python", "bench/paper/run.py", *(sys.argv[1:] if words is None else words)])
    evaluate.quieten_libraries()
    try:
        protocol = protocol_of(arguments)
        if arguments.dry_run:
            print(plan_of_run.described(protocol, training_data.deal(protocol), arguments.out))
        else:
            print(run(protocol, arguments.out, command))
            print(f"{arguments.out}: results.json, table.md and card.md")
    except CsuloraError as error:
        sys.exit(f"run.py: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; what is finished is kept, and the same command continues")


if __name__ == "__main__":
    main()
