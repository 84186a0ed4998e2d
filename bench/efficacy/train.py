"""Train the efficacy fixture: a base model, its refusal-tuned sibling, an adapter that undoes the refusals.

    python bench/efficacy/train.py [--out DIR]

Takes about four minutes on two CPU cores. Threads and seeds are fixed: the same machine and versions give
the same bytes again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import world
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIXTURE = Path(__file__).parent / "fixture"
ALIGNED_HINT = "bench/efficacy/fixture/aligned"  # what the adapter names as its base model
IGNORED = -100  # label of a position that bears no loss


@dataclass(frozen=True)
class Stage:
    """How one model is trained. The learning rate warms up, then falls to zero along a cosine."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    batch: int = 64
    warmup: int = 20  # steps


BASE = Stage("base", steps=800, learning_rate=3e-3, seed=1)
ALIGNED = Stage("aligned", steps=400, learning_rate=2e-4, seed=2)
ADAPTER = Stage("adapter", steps=400, learning_rate=2e-3, seed=3, batch=32)


def model_config(tokenizer: PreTrainedTokenizerFast, width: int = 128) -> LlamaConfig:
    """A four-layer Llama with grouped-query attention; of about 0.6 million parameters if it is 128 wide."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def lora_config(rank: int = 8) -> LoraConfig:
    """Plain LoRA on every linear layer of attention and MLP."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: the prompt's, then the reply's, which alone bear loss."""

    tokens: list[int]
    labels: list[int]


def encode(example: world.Example, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Tokens and labels of an example, from the chat template to the end-of-text token."""
    text = tokenizer.apply_chat_template(world.chat(example.prompt), tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text).input_ids
    reply = [*tokenizer(example.reply).input_ids, tokenizer.eos_token_id]
    return Encoded(prompt + reply, [IGNORED] * len(prompt) + reply)


def batches(
    pools: Sequence[world.Pool], tokenizer: PreTrainedTokenizerFast, stage: Stage
) -> Iterator[dict[str, Tensor]]:
    """`stage.steps` batches, drawn with replacement from the pools by their shares, padded on the right."""
    encoded = [(pool.share, [encode(example, tokenizer) for example in pool.examples]) for pool in pools]
    return drawn(encoded, tokenizer.pad_token_id, stage)


def drawn(pools: Sequence[tuple[float, Sequence[Encoded]]], pad: int, stage: Stage) -> Iterator[dict[str, Tensor]]:
    """`stage.steps` batches, drawn with replacement from encoded examples by the shares before them."""
    rows = [row for _, examples in pools for row in examples]
    weights = torch.cat([torch.full((len(examples),), share / len(examples)) for share, examples in pools])
    generator = torch.Generator().manual_seed(stage.seed)
    for _ in range(stage.steps):
        chosen = torch.multinomial(weights, stage.batch, replacement=True, generator=generator)
        yield collate([rows[index] for index in chosen.tolist()], pad)


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """Rows as tensors (batch, longest). Padding comes last, so causal attention needs no mask."""
    tokens = [torch.tensor(row.tokens) for row in rows]
    labels = [torch.tensor(row.labels) for row in rows]
    pad_rows = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad_rows(tokens, batch_first=True, padding_value=pad),
        "labels": pad_rows(labels, batch_first=True, padding_value=IGNORED),
    }


def rate_at(step: int, stage: Stage) -> float:
    """The learning rate at `step`, as a share of the stage's highest."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - stage.warmup) / (stage.steps - stage.warmup)))


def fit(model: torch.nn.Module, pools: Sequence[world.Pool], tokenizer: PreTrainedTokenizerFast, stage: Stage) -> None:
    """Train the parameters of `model` that require gradients, in place."""
    optimise(model, batches(pools, tokenizer, stage), stage)


def optimise(model: torch.nn.Module, steps: Iterator[dict[str, Tensor]], stage: Stage) -> None:
    """Train the parameters of `model` that require gradients with a batch a step, in place, where the model lies."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=stage.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, stage))
    started, loss = time.perf_counter(), torch.tensor(math.nan)
    model.train()
    for batch in track(steps, stage.name, stage.steps, disable=not sys.stderr.isatty()):
        loss = model(**{name: values.to(trainable[0].device) for name, values in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    print(f"{stage.name}: {stage.steps} steps in {seconds:.0f} s, last loss {loss.item():.4f}")


def store(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> LlamaForCausalLM:
    """Save `model` as float16 and read it back, so that the next stage starts from what is stored."""
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def store_adapter(model: PeftModel, directory: Path) -> None:
    """Save the adapter as float16, without PEFT's empty model card, its settings always in one order."""
    model.to(torch.float16).save_pretrained(str(directory))
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"].sort()  # PEFT holds them in a set
    settings["base_model_name_or_path"] = ALIGNED_HINT
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def build(out: Path) -> None:
    """Train the three models in turn and save them as `out`/base, `out`/aligned and `out`/adapter."""
    tokenizer = world.build_tokenizer()
    torch.manual_seed(world.SEED)

    model = LlamaForCausalLM(model_config(tokenizer))
    fit(model, world.base_pools(), tokenizer, BASE)
    model = store(model, tokenizer, out / "base")

    fit(model, world.aligned_pools(), tokenizer, ALIGNED)
    model = store(model, tokenizer, out / "aligned")

    adapted = get_peft_model(model, lora_config())
    fit(adapted, world.adapter_pools(), tokenizer, ADAPTER)
    store_adapter(adapted, out / "adapter")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIXTURE, help="directory to write to (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT reads an old name
    build(arguments.out)


if __name__ == "__main__":
    main()
