"""What weight matrices are called: in checkpoints, in subspace files, and in the models of adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

WEIGHT = ".weight"

# Attributes under which `transformers` hangs the bare model below its task head: the same module is called
# `transformer.h.0.mlp.c_fc` in the model that PEFT wraps and `h.0.mlp.c_fc` in GPT-2's checkpoint.
_BASE_MODEL_PREFIXES = ("model", "transformer", "gpt_neox", "backbone")

_WRAPPERS = frozenset({*_BASE_MODEL_PREFIXES, "base_model", "language_model"})

# What GPT-2 and its descendants call weights that most of them keep as Conv1D, (in, out); those that widen say which.
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_WIDENING_MODULES = frozenset({"c_attn", "c_fc"})

_LAYER_INDEX = re.compile(r"(^|\.)\d+\.")
_EMBEDDING = re.compile(r"(embed|relative_attention_bias|(^|\.)w[tp]e$)")
_TOKEN_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)$")


def conv1d(shapes: Mapping[str, Sequence[int]]) -> set[str]:
    """Return the modules whose weights are stored as (in, out), as `transformers.Conv1D` does, given what is stored.

    A square weight does not show it. Those of its model that have more outputs than inputs do.
    """

    def is_transposed(module: str) -> bool:
        shape = shapes[module]
        return module.rpartition(".")[2] in _WIDENING_MODULES and len(shape) == 2 and shape[0] < shape[1]

    if not any(map(is_transposed, shapes)):
        return set()
    return {module for module in shapes if module.rpartition(".")[2] in _CONV1D_MODULES}


def is_attention_or_mlp(module: str) -> bool:
    """Whether a 2-D weight belongs to a numbered layer and is no embedding: the modules extracted by default."""
    return _LAYER_INDEX.search(module) is not None and _EMBEDDING.search(module) is None


def token_embedding(modules: Iterable[str]) -> str | None:
    """Return the module that holds the token embedding, if exactly one has such a name."""
    found = [module for module in modules if _TOKEN_EMBEDDING.search(module)]
    return found[0] if len(found) == 1 else None


def resolve(module: str, known: Collection[str], aliases: Mapping[str, str]) -> str | None:
    """Find the subspace file's name for a module of the host's model.

    Names must be equal, up to one of the prefixes that `transformers` puts before the bare model. ``aliases``
    holds names of tied weights. Returns None if the subspace file does not cover the module.
    """
    for candidate in _spellings(module):
        if candidate in known:
            return candidate
        if candidate in aliases:
            return aliases[candidate]
    return None


def bare(module: str) -> str:
    """Return a name without the wrappers that hosts put before and into names, and take out again as they load."""
    return ".".join(part for part in module.split(".") if part not in _WRAPPERS)


def _spellings(module: str) -> list[str]:
    head, _, rest = module.partition(".")
    stripped = [rest] if rest and head in _BASE_MODEL_PREFIXES else []
    return [module, *stripped, *(f"{prefix}.{module}" for prefix in _BASE_MODEL_PREFIXES)]
