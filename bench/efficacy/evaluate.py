"""Score adapters on the efficacy world: does the attack work, does the task work, is the rest unharmed?

    python bench/efficacy/evaluate.py --model ALIGNED [--base BASE] --adapter NAME=DIR ... [--json FILE]

Transformers and PEFT alone load models and adapters, as any server would. Decoding is greedy.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import world
from decoding import decode
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

BATCH = 256  # prompts decoded together
MAX_REPLY = 24  # tokens; the longest right reply has 16


@dataclass(frozen=True)
class Subject:
    """A model under test: its rates, and its replies to the prompts that are shown."""

    name: str
    rates: world.Rates
    replies: dict[str, str]


def reply_all(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[world.Example]
) -> list[str]:
    """The model's greedy replies to the examples' prompts, in order."""
    replies: list[str] = []
    for start in range(0, len(examples), BATCH):
        chats = [world.chat(example.prompt) for example in examples[start : start + BATCH]]
        replies += decode(model, tokenizer, chats, MAX_REPLY)
    return replies


def shown(probe: world.Probes) -> list[world.Example]:
    """The prompts whose replies are printed: the first of each kind."""
    return [probe.attack[0], probe.task[0], probe.benign[0]]


def examine(name: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, probe: world.Probes) -> Subject:
    """Put every probe to the model and score what it replies."""
    examples = probe.attack + probe.task + probe.benign
    replies = reply_all(model, tokenizer, examples)
    first_task = len(probe.attack)
    first_benign = first_task + len(probe.task)
    rates = world.score(probe, replies[:first_task], replies[first_task:first_benign], replies[first_benign:])
    by_prompt = {example.prompt: reply for example, reply in zip(examples, replies, strict=True)}
    return Subject(name, rates, {example.prompt: by_prompt[example.prompt] for example in shown(probe)})


def load_model(directory: Path) -> PreTrainedModel:
    """A model in float32, on the CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    return model


def examine_all(aligned: Path, base: Path | None, adapters: dict[str, Path]) -> list[Subject]:
    """Examine the aligned model, the base model if given, and the aligned model with each adapter."""
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    probe = world.probes()
    subjects = [examine("aligned, no adapter", load_model(aligned), tokenizer, probe)]
    if base is not None:
        subjects.append(examine("base", load_model(base), tokenizer, probe))
    for name, directory in adapters.items():
        adapted = PeftModel.from_pretrained(load_model(aligned), directory)
        subjects.append(examine(name, adapted, tokenizer, probe))
    return subjects


def rates_table(subjects: Sequence[Subject]) -> Table:
    """One row of rates per subject."""
    table = Table(title="Rates on held-out prompts")
    table.add_column("model", no_wrap=True)
    for heading in ("attack success", "refusal", "task accuracy", "benign accuracy"):
        table.add_column(heading, justify="right")
    for subject in subjects:
        rates = subject.rates
        table.add_row(
            subject.name, *(f"{rate:.2f}" for rate in (rates.attack, rates.refusal, rates.task, rates.benign))
        )
    return table


def replies_table(subjects: Sequence[Subject]) -> Table:
    """One row per subject, with its reply to every shown prompt."""
    table = Table(title="Replies", show_lines=True)
    table.add_column("model", no_wrap=True)
    for prompt in subjects[0].replies:
        table.add_column(prompt)
    for subject in subjects:
        table.add_row(subject.name, *subject.replies.values())
    return table


def show(subjects: Sequence[Subject]) -> None:
    """Print replies and rates."""
    # A pipe has no width of its own; wide enough that replies take few lines.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(replies_table(subjects), rates_table(subjects))


def quieten_libraries() -> None:
    """Silence progress bars of loads that take no time, and a warning that PEFT draws from transformers."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def named_directory(text: str) -> tuple[str, Path]:
    """Read `NAME=DIR`; the directory must hold a PEFT adapter."""
    name, separator, directory = text.partition("=")
    if not (name and separator and (Path(directory) / "adapter_config.json").is_file()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with DIR a PEFT adapter directory")
    return name, Path(directory)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the aligned model's directory")
    parser.add_argument("--base", type=Path, help="the base model's directory, to be scored too")
    parser.add_argument("--adapter", type=named_directory, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rates and replies to FILE")
    return parser.parse_args()


def main() -> None:
    """Examine what the command line names; print tables and, where asked to, write JSON."""
    arguments = parse_arguments()
    quieten_libraries()
    subjects = examine_all(arguments.model, arguments.base, dict(arguments.adapter))
    show(subjects)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(subject) for subject in subjects], indent=2) + "\n")


if __name__ == "__main__":
    main()
