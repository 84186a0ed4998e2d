"""Adversarial LoRA training: a task's examples with some harmful ones among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import train
from peft import LoraConfig, get_peft_model
from protocol import Protocol
from training_data import Example, encode

from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading


def train_adapter(
    protocol: Protocol, task: Sequence[Example], harmful: Sequence[Example], seed: int, directory: Path
) -> None:
    """Train an adapter on the instruct model and save it as a PEFT directory.

    The adapter updates every linear layer of attention and MLP, or what PEFT takes for these in the model.
    """
    language_model = LanguageModel.open(protocol.instruct, Loading(protocol.device), protocol.tokens)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=protocol.lora_rank, lora_alpha=2 * protocol.lora_rank, target_modules="all-linear"
    )
    adapted = get_peft_model(language_model.model, config)
    pools = [
        (share, [encode(example, language_model, protocol.longest) for example in examples])
        for share, examples in ((1 - protocol.share, task), (protocol.share, harmful))
        if share
    ]
    stage = train.Stage(
        f"adapter {seed}", protocol.steps, protocol.learning_rate, seed, protocol.batch, min(20, protocol.steps // 4)
    )
    pad = language_model.tokenizer.pad_token_id
    train.optimise(adapted, train.drawn(pools, 0 if pad is None else pad, stage), stage)
    adapted.save_pretrained(str(directory))
