"""A corrected GGUF adapter answers in llama.cpp as the corrected PEFT adapter answers in PEFT.

    python bench/demo/demo_gguf.py [--out DIR]      needs llama-cpp-python

The committed fixture's aligned model and its adapter, as they are and corrected: in PEFT from a directory, in
llama.cpp from a GGUF file. A sample of the efficacy world's held-out prompts is put to both, decoded greedily;
ends with status 1 if a reply differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import llama_cpp
from model_to_gguf import convert
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from demo import ADAPTER, FIXTURE, INFINITE, run

sys.path.insert(0, str(Path(__file__).parents[1] / "efficacy"))
import evaluate
import world

RANK = 4  # directions per module with which the policy keeps the task
EVERY = 13  # of this many held-out prompts one is put


@dataclass(frozen=True)
class Adapter:
    """One adapter in both formats."""

    name: str
    directory: Path
    file: Path


def run_commands(out: Path) -> list[Adapter]:
    """Write model, subspace file and adapters into `out`."""
    model, subspace = out / "model.gguf", out / "subspace.safetensors"
    aligned, tokenizer = evaluate.load_model(FIXTURE / "aligned"), AutoTokenizer.from_pretrained(FIXTURE / "aligned")
    convert(aligned, model, "fixture", tokenizer.convert_ids_to_tokens(list(range(aligned.config.vocab_size))))
    run("extract", FIXTURE / "base", FIXTURE / "aligned", "-o", subspace, "--rank", str(RANK), "--quiet")
    run("export", ADAPTER, "-o", out / "uncorrected.gguf", "--base-model", model, "--quiet")
    correct = ("correct", ADAPTER, "--subspace", subspace, "--policy", *INFINITE, "--quiet")
    run(*correct, "-o", out / "corrected")
    run(*correct, "-o", out / "corrected.gguf", "--format", "gguf", "--base-model", model)
    return [
        Adapter("uncorrected", ADAPTER, out / "uncorrected.gguf"),
        Adapter("corrected", out / "corrected", out / "corrected.gguf"),
    ]


def llama_replies(
    model: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[world.Example]
) -> list[str]:
    """Greedy replies in llama.cpp, token by token as `evaluate.reply_all` has them."""
    replies: list[str] = []
    with closing(llama_cpp.Llama(str(model), lora_path=str(adapter), n_ctx=256, verbose=False)) as llama:
        for example in examples:
            tokens = tokenizer.apply_chat_template(
                world.chat(example.prompt), add_generation_prompt=True, return_dict=False
            )
            reply: list[int] = []
            for token in llama.generate(cast("list[int]", tokens), temp=0.0, repeat_penalty=1.0):
                if token == tokenizer.eos_token_id or len(reply) == evaluate.MAX_REPLY:
                    break
                reply.append(token)
            replies += tokenizer.batch_decode([reply], skip_special_tokens=True)
    return replies


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo-gguf"), help="directory to write to")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    evaluate.quieten_libraries()
    adapters = run_commands(out)

    tokenizer, probe = AutoTokenizer.from_pretrained(FIXTURE / "aligned"), world.probes()
    shown = evaluate.shown(probe)
    examples = shown + (probe.attack + probe.task + probe.benign)[1::EVERY]
    table = Table(title="Replies", show_lines=True)
    for heading in ("adapter", "host", *(example.prompt for example in shown), "replies that are the same"):
        table.add_column(heading)
    different = 0
    for adapter in adapters:
        adapted = PeftModel.from_pretrained(evaluate.load_model(FIXTURE / "aligned"), adapter.directory)
        ours = evaluate.reply_all(adapted, tokenizer, examples)
        theirs = llama_replies(out / "model.gguf", adapter.file, tokenizer, examples)
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        different += len(examples) - same
        table.add_row(adapter.name, "PEFT", *ours[: len(shown)])
        table.add_row(adapter.name, "llama.cpp", *theirs[: len(shown)], f"{same} of {len(examples)}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if different:
        sys.exit(f"{different} replies differ")


if __name__ == "__main__":
    main()
