"""The grid's models: trained when they are first asked for, then kept; complete or absent.

python bench/efficacy/lab.py --out DIR    # trains all that the grid needs, and nothing else
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import train
import world
from peft import get_peft_model
from scenario import Adapter, Scenario, sentences
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import csulora

WIDTH = 96
SUBSPACE_RANK = 64
BASE = train.Stage("base", steps=700, learning_rate=3e-3, seed=1, batch=32)
ALIGNED = train.Stage("aligned", steps=400, learning_rate=5e-4, seed=2, batch=32)
ADAPTER = train.Stage("adapter", steps=300, learning_rate=2e-3, seed=3, batch=32)
ALPHA = 16  # of every adapter, whatever its rank


def tokenizer() -> PreTrainedTokenizerFast:
    """The one tokenizer of all scenarios."""
    return world.build_tokenizer(sentences())


class Lab:
    """All models of one scenario, below one directory."""

    def __init__(self, out: Path, scenario: Scenario) -> None:
        """Use, or create, the scenario's directory below `out`."""
        self.scenario = scenario
        self.directory = out / scenario.name
        self.directory.mkdir(parents=True, exist_ok=True)

    def base(self) -> Path:
        """The model before alignment."""
        return self._made("base", self._train_base)

    def aligned(self) -> Path:
        """The model after alignment."""
        return self._made("aligned", self._train_aligned)

    def subspace(self) -> csulora.Subspace:
        """The model pair's subspaces, of full certificate rank; `truncated` makes smaller ones."""
        path = self.directory / "subspace.safetensors"
        if not path.is_file():
            csulora.extract(self.base(), self.aligned(), output=path, rank=SUBSPACE_RANK, dtype="f32")
        return csulora.Subspace.open(path)

    def adapter(self, adapter: Adapter) -> Path:
        """A trained adapter, as a PEFT directory."""
        return self._made(adapter.name, lambda directory: self._train_adapter(adapter, directory))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        directory = self.directory / name
        if not directory.is_dir():
            partial = self.directory / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            print(f"{directory}: ", end="", flush=True)
            make(partial)
            partial.rename(directory)
        return directory

    def _stage(self, stage: train.Stage, seed: int = 0) -> train.Stage:
        return replace(stage, seed=stage.seed + 1000 * self.scenario.seed + 10 * seed)

    def _train_base(self, directory: Path) -> None:
        words = tokenizer()
        torch.manual_seed(self.scenario.seed)
        model = LlamaForCausalLM(train.model_config(words, WIDTH))
        train.fit(model, self.scenario.base_pools(), words, self._stage(BASE))
        train.store(model, words, directory)

    def _train_aligned(self, directory: Path) -> None:
        words = tokenizer()
        model = LlamaForCausalLM.from_pretrained(self.base(), dtype=torch.float32)
        train.fit(model, self.scenario.aligned_pools(), words, self._stage(ALIGNED))
        train.store(model, words, directory)

    def _train_adapter(self, adapter: Adapter, directory: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(self.aligned(), dtype=torch.float32)
        torch.manual_seed(adapter.seed)
        adapted = get_peft_model(model, train.lora_config(adapter.rank))
        pools = self.scenario.adapter_pools(adapter)
        train.fit(adapted, pools, tokenizer(), self._stage(ADAPTER, adapter.seed))
        train.store_adapter(adapted, directory)
