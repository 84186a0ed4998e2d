"""Tiny models of families whose names on disk, in memory and in adapters differ, and how tests build them."""

from pathlib import Path
from typing import Any

import torch
import transformers

import csulora
import factories
import tiny_model
from csulora.models.checkpoint import Checkpoint
from csulora.models.names import kind_of
from language_families import LANGUAGE_FAMILIES, Family
from wrapper_families import WRAPPER_FAMILIES

FAMILIES: dict[str, Family] = LANGUAGE_FAMILIES | WRAPPER_FAMILIES

TOKENS = [1, 9, 17, 23, 40, 5]

# What a wrapper calls the language model on disk -> what a text-only class calls it.
_TEXT_ONLY = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def built(family: Family) -> Any:
    """Return a model with random weights."""
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(family.config()).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() >= 2:
                parameter.copy_(0.2 * factories.gaussian(*parameter.shape, seed=i))
    return model


def move(model: Any, seed: int) -> None:
    """Change every matrix, as alignment does."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                parameter.add_(0.05 * factories.gaussian(*parameter.shape, seed=seed + i))


def extracted(family: Family, root: Path, *endings: str) -> tuple[dict[str, tuple[int, int]], csulora.Subspace]:
    """Save a base and an aligned model; return the linear modules as on disk, and the pair's subspaces."""
    model = built(family)
    model.save_pretrained(root / "base")
    move(model, seed=1000)
    model.save_pretrained(root / "aligned")
    subspace = csulora.extract(root / "base", root / "aligned", rank=4)
    weights = Checkpoint.open(root / "aligned").weights
    modules = {
        name: weight.shape for name, weight in weights.items() if kind_of(name) == "linear" and name.endswith(endings)
    }
    return modules, subspace


def save_expert_pair(model: Any, root: Path) -> None:
    """Write ``base``, and ``aligned`` with a tokenizer; stacked experts move between them. The model ends aligned."""
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() == 3:
                parameter.add_(0.1 * factories.gaussian(*parameter.shape, seed=1000 + i))
    model.save_pretrained(root / "aligned")
    tiny_model.tokenizer().save_pretrained(root / "aligned")


def train(adapted: Any, scale: float = 0.1, seed: int = 100, dtype: torch.dtype | None = None) -> None:
    """Give a model of PEFT's random factors, in a storage type or each in its own."""
    for i, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data = (scale * factories.gaussian(*parameter.shape, seed=seed + i)).to(dtype or parameter.dtype)


def opened(family: Family, checkpoint: Path, *, is_text_only: bool = False) -> Any:
    """Load a checkpoint in float32, as its own class or as the text-only one."""
    if not is_text_only:
        return getattr(transformers, family.model).from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert family.text_model is not None
    config = family.config()
    own = config.text_config.tie_word_embeddings
    config.text_config.tie_word_embeddings = getattr(config, "tie_word_embeddings", own)
    model, found = getattr(transformers, family.text_model).from_pretrained(
        checkpoint,
        config=config.text_config,
        key_mapping=_TEXT_ONLY,
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not found["missing_keys"]
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits
    return found.double()
