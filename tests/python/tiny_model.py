"""A model pair as transformers loads it, small and random, with a tokenizer, a subspace file and adapters for it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import csulora
import factories

WORDS = [f"w{number}" for number in range(28)]
MODULES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
    "model.layers.1.self_attn.o_proj": (32, 32),
    "model.layers.1.mlp.up_proj": (48, 32),
}
REPLY = 6  # tokens


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that replies differ
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def prompts(first: str, count: int) -> str:
    """A file of prompts that all begin with one word."""
    return "".join(f"{first} {WORDS[at % 7]} {WORDS[7 + at // 7]}\n" for at in range(count))


@dataclass(frozen=True)
class Place:
    """Files of a model pair, with two adapters that take the alignment back and do something else besides."""

    aligned: Path
    subspace: Path
    adapters: tuple[Path, Path]
    safety: Path
    task: Path


def build(directory: Path) -> Place:
    base = llama()
    base.save_pretrained(directory / "base")
    weights = {name: weight.detach().clone() for name, weight in base.state_dict().items()}
    for at, (name, (rows, columns)) in enumerate(MODULES.items()):
        weights[f"{name}.weight"] += (
            0.6 * factories.gaussian(rows, 2, seed=at) @ factories.gaussian(2, columns, seed=50 + at)
        )
    aligned = llama()
    aligned.load_state_dict(weights)
    aligned.save_pretrained(directory / "aligned")
    tokenizer().save_pretrained(directory / "aligned")
    csulora.extract(
        directory / "base", directory / "aligned", rank=2, output=directory / "subspace", modules=list(MODULES)
    )
    subspace = csulora.Subspace.open(directory / "subspace")
    adapters = adapter(directory / "adapter1", subspace, 1), adapter(directory / "adapter2", subspace, 2)
    (directory / "safety.txt").write_text(prompts("w20", 16))
    (directory / "task.txt").write_text(prompts("w21", 16))
    return Place(
        directory / "aligned", directory / "subspace", adapters, directory / "safety.txt", directory / "task.txt"
    )


def adapter(path: Path, subspace: csulora.Subspace, seed: int, besides: float = 0.3) -> Path:
    """Write an adapter that takes the alignment back, and does so much of something else."""
    modules = {}
    for at, (name, (rows, columns)) in enumerate(MODULES.items()):
        u, s, v = (factor.float() for factor in (subspace[name].u, subspace[name].s, subspace[name].v))
        b = torch.cat([-u * s, besides * factories.gaussian(rows, 2, seed=100 * seed + at)], 1)
        a = torch.cat([v.T, factories.gaussian(2, columns, seed=200 * seed + at)])
        modules[name] = csulora.LoraModule(b, a)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(MODULES)}
    csulora.save_adapter(csulora.Adapter(modules, config, path.with_name("unsaved"), ""), path)
    return path
