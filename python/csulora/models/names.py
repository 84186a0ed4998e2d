"""What weight matrices are called: in checkpoints, in subspace files, and in the models of adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

WEIGHT = ".weight"

# Attributes under which `transformers` hangs the bare model below its task head, and a language model in one that also
# sees: the same module is called `transformer.h.0.mlp.c_fc` in the model that PEFT wraps and `h.0.mlp.c_fc` in GPT-2's
# checkpoint. No attribute of a vision or audio tower may be among them.
_WRAPPERS = frozenset({"model", "transformer", "gpt_neox", "backbone", "base_model", "language_model"})

# What families call an expert's gate, up and down projections.
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "fc1": "gate_proj", "fc3": "up_proj"} | {
    "fc2": "down_proj"
}
_NAME_OF_EXPERT = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<expert>\d{1,6})\.(?P<projection>\w+)")
_EXPERT = re.compile(r"(?<=\bexperts\.)(?P<expert>\d+)\.(?P<projection>\w+)$")

# What GPT-2 and its descendants call weights that most of them keep as Conv1D, (in, out); those that widen say which.
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_WIDENING_MODULES = frozenset({"c_attn", "c_fc"})

# Last parts of names of 2-D weights that are looked up, not multiplied with, and of those that make logits.
# A patch embedding multiplies.
_EMBEDDING = re.compile(r"((?!patch_)\w*embed(ding)?s?|embed_(?!out)\w+|w[tp]e|shared|relative_attention_bias)$")
_HEAD = re.compile(r"(lm_head|embed_out)$")
_VOCABULARY = re.compile(r"(embed_tokens(_per_layer)?|wte|embed_in|embed_out|word_embeddings|shared|lm_head)$")
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
    return set(filter(may_be_conv1d, shapes))


def may_be_conv1d(module: str) -> bool:
    """Whether GPT-2 or one of its descendants may store a weight of this name as (in, out).

    >>> may_be_conv1d("transformer.h.0.attn.c_proj"), may_be_conv1d("model.layers.0.self_attn.o_proj")
    (True, False)
    """
    return module.rpartition(".")[2] in _CONV1D_MODULES


def kind_of(module: str) -> str:
    """Return what a 2-D weight is: ``linear``, which is extracted by default, ``embedding`` or ``head``.

    >>> [kind_of(name) for name in ("model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head")]
    ['linear', 'embedding', 'head']
    """
    last = module.rpartition(".")[2]
    if _HEAD.match(last):
        return "head"
    return "embedding" if _EMBEDDING.match(last) else "linear"


def has_a_row_per_token(module: str) -> bool:
    """Whether a 2-D weight's rows are the vocabulary, which alignment may extend by tokens of its own.

    >>> has_a_row_per_token("model.embed_tokens"), has_a_row_per_token("transformer.wpe")
    (True, False)
    """
    return _VOCABULARY.match(module.rpartition(".")[2]) is not None


def token_embedding(modules: Iterable[str]) -> str | None:
    """Return the module that holds the token embedding, if exactly one has such a name."""
    found = [module for module in modules if _TOKEN_EMBEDDING.search(module)]
    return found[0] if len(found) == 1 else None


def bare(module: str) -> str:
    """Return a name without the wrappers that hosts put before and into names, and take out again as they load."""
    if _EXPERT.search(module):
        module = with_known_projection(module).replace(".block_sparse_moe.", ".mlp.")
    return without_wrappers(module)


def without_wrappers(module: str) -> str:
    """Return a name without the attributes under which hosts hang the bare model, and the language model in others.

    >>> without_wrappers("model.language_model.layers.0.block_sparse_moe.experts.3.w1")
    'layers.0.block_sparse_moe.experts.3.w1'
    """
    return ".".join(part for part in module.split(".") if part not in _WRAPPERS)


def with_known_projection(module: str) -> str:
    """Return an expert's name with its projection called as most families do; other names as they are.

    >>> with_known_projection("model.layers.0.block_sparse_moe.experts.3.w1")
    'model.layers.0.block_sparse_moe.experts.3.gate_proj'
    """
    if not (found := _EXPERT.search(module)):
        return module
    return f"{module[: found.start()]}{found['expert']}.{projection_of(found['projection'])}"


def projection_of(name: str) -> str:
    """Return which projection of an expert a family's name for it is: ``w1`` is Mixtral's ``gate_proj``.

    >>> [projection_of(name) for name in ("w1", "up_proj")]
    ['gate_proj', 'up_proj']
    """
    return _PROJECTIONS.get(name, name)


def parse_expert(module: str) -> tuple[str, int, str] | None:
    """Return the experts module, the expert and the projection that a name says; None if it is no expert's.

    >>> parse_expert("model.layers.0.mlp.experts.3.gate_proj")
    ('model.layers.0.mlp.experts', 3, 'gate_proj')
    """
    found = _NAME_OF_EXPERT.fullmatch(module)
    return (found["experts"], int(found["expert"]), found["projection"]) if found else None


def is_expert(module: str) -> bool:
    """Whether a module is a projection of one expert.

    >>> [is_expert(name) for name in ("model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.gate")]
    [True, False]
    """
    return bool(_EXPERT.search(module))
