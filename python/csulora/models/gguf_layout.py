"""How llama.cpp lays out a model: which architectures are known, what tensors are called, how rows are ordered.

An architecture is listed only if a test compares llama.cpp's logits with PEFT's for it. The names of tensors in
layers come from gguf's own table. Modules go by their names in Hugging Face's causal language models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, TensorNameMap

from csulora.errors import BuildError, RefusedError
from csulora.models import experts, gguf_experts, gguf_orders
from csulora.models.gguf_ignored import why_not
from csulora.models.gguf_model_types import MODEL_TYPES
from csulora.models.gguf_orders import Order, Spread
from csulora.models.names import bare
from csulora.subspace.expert_layout import ExpertLayout

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SHARED_EXPERT_GATE = "mlp.shared_expert_gate"  # a matrix of one row, which GGUF files keep as a vector

_SEPARATE_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_SEPARATE = (*_SEPARATE_QKV, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_VALUE_HEADS = {
    "linear_attn.in_proj_qkv": gguf_orders.values_last,
    **dict.fromkeys(
        ("linear_attn.in_proj_z", "linear_attn.in_proj_a", "linear_attn.in_proj_b"), gguf_orders.value_heads
    ),
}
_QKVZ = "linear_attn.in_proj_qkvz"
_ROTARY = {"self_attn.q_proj": gguf_orders.rotary_queries, "self_attn.k_proj": gguf_orders.rotary_keys}

_EXPERTS, _ROUTER = "mlp.experts", "mlp.gate"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QWEN_MOE = (
    *(*_SEPARATE_QKV, _ROUTER),
    *(*(f"mlp.shared_expert.{part}" for part in _PROJECTIONS), SHARED_EXPERT_GATE),
)
_LFM2 = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    *("conv.in_proj", "conv.out_proj", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)

_OUTSIDE = {EMBEDDING: TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD], HEAD: TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}

# Parts that gguf's table knows by another name.
_SPELLED_IN_GGUF = {"block_sparse_moe.router": "block_sparse_moe.router.layer"}

# At most four digits and no leading zero: every name has one spelling.
_IN_LAYER = re.compile(r"(?P<stem>model\.layers|blk)\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<part>.+)")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: what GGUF's ``general.architecture`` says.
        parts: the weight matrices of a layer, by the end of their modules' names.
        rows: the orders of the rows that stand otherwise in GGUF files, by part.
        columns: the same of columns.
        spread: parts whose rows, in that order, llama.cpp's converter of today spreads over several tensors.
        ignored: GGUF names of weights outside layers whose updates llama.cpp ignores, by their modules.
        multipliers: keys of the configuration whose product is multiplied into a GGUF file's weight, by part.
        unlike: metadata that models have whose rows are in yet another order, which is not supported.
        counts: what the orders follow from, by the names of `gguf_orders.SOURCES`.
        experts: end of the names of experts modules; empty if there are none.
        has_gates: its experts have gate projections.
        fuses_experts: llama.cpp's converter always keeps gate and up of experts in one tensor.
        expert_scales: end of the name of what multiplies the outputs of experts, (E); llama.cpp does so before it
            adds updates, transformers afterwards.
    """

    name: str
    parts: tuple[str, ...] = _SEPARATE
    rows: Mapping[str, Order] = field(default_factory=dict)
    columns: Mapping[str, Order] = field(default_factory=dict)
    spread: Mapping[str, Spread] = field(default_factory=dict)
    counts: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    multipliers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unlike: str = ""
    experts: str = ""
    has_gates: bool = True
    fuses_experts: bool = False
    expert_scales: str = ""

    @property
    def expert_layout(self) -> ExpertLayout:
        """How transformers lays out experts in memory."""
        return experts.layout_of([kind for kind, name in MODEL_TYPES.items() if name == self.name])

    def tensor_name(self, module: str) -> str | None:
        """Return a module's GGUF name less ``.weight``; None if llama.cpp has no such weight matrix.

        A module that is spread over several tensors has this name in files of older converters.
        """
        return self._outside().get(module) or _rename(module, "model.layers", "blk", _part_names(self.name, self.parts))

    def module_name(self, tensor: str) -> str | None:
        """Return the module of a GGUF name less ``.weight``; None if it is no weight matrix of a known module."""
        parts = {name: part for part, name in _part_names(self.name, self.parts).items()}
        parts |= {tensor: part for part, spread in self.spread.items() for tensor in spread.tensors}
        outside = {name: module for module, name in self._outside().items()}
        return outside.get(tensor) or _rename(tensor, "blk", "model.layers", parts)

    def spread_of(self, module: str) -> Spread | None:
        """Return how a module's rows are spread over tensors, by their GGUF names; None if one tensor holds them."""
        found = self.spread.get(_part(module))
        return found and found._replace(tensors=tuple(f"blk.{layer_of(module)}.{end}" for end in found.tensors))

    def is_expert(self, module: str) -> bool:
        """Whether a module is a projection of one of the architecture's experts."""
        return gguf_experts.tensor_name(module, self.experts, fused=False) is not None

    def is_router(self, module: str) -> bool:
        """Whether a module chooses between experts."""
        return (self.tensor_name(module) or "").endswith(".ffn_gate_inp")

    def is_ignored(self, module: str) -> bool:
        """Whether llama.cpp ignores updates of this module."""
        return bare(module) in {bare(known) for known in self.ignored}

    def multiplied_by(self, module: str) -> tuple[str, ...]:
        """Return the keys of the configuration whose values are multiplied into a module's weight."""
        return self.multipliers.get(_part(module), ())

    def row_order(self, module: str) -> Order | None:
        """Return the order of a module's rows; None if it is Hugging Face's."""
        return self.rows.get(_part(module))

    def column_order(self, module: str) -> Order | None:
        """Return the order of a module's columns; None if it is Hugging Face's."""
        return self.columns.get(_part(module))

    def _outside(self) -> Mapping[str, str]:
        return {**_OUTSIDE, **self.ignored}

    def is_reordered(self, module: str) -> bool:
        """Whether rows or columns of this module's weight, or its updates' scale, are others in some GGUF files."""
        if self.unlike or self.multipliers or (self.expert_scales and self.is_expert(module)):
            return True
        return _part(module) in self.rows or _part(module) in self.columns


# Without mamba.in_proj, whose rows have multipliers of their own, and mamba.out_proj, which PEFT does not adapt.
_FALCON_H1 = Architecture(
    "falcon-h1",
    parts=(
        *_SEPARATE_QKV,
        *("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
    ),
    multipliers={
        "self_attn.q_proj": ("attention_in_multiplier",),
        "self_attn.k_proj": ("attention_in_multiplier", "key_multiplier"),
        "self_attn.v_proj": ("attention_in_multiplier",),
        "self_attn.o_proj": ("attention_out_multiplier",),
        "feed_forward.gate_proj": ("mlp_multipliers.0",),
        "feed_forward.down_proj": ("mlp_multipliers.1",),
        EMBEDDING: ("embedding_multiplier",),
        HEAD: ("lm_head_multiplier",),
    },
)


def _permuted(name: str, parts: tuple[str, ...] = _SEPARATE, experts: str = "") -> Architecture:
    return Architecture(name, parts, rows=_ROTARY, counts=("heads", "kv_heads"), experts=experts)


def _gated_delta(name: str, parts: tuple[str, ...], experts: str = "") -> Architecture:
    return Architecture(
        name,
        parts=(*parts, *_VALUE_HEADS, "linear_attn.out_proj"),
        rows=_VALUE_HEADS,
        columns={"linear_attn.out_proj": gguf_orders.value_heads},
        counts=("key_heads", "value_heads", "value_size"),
        experts=experts,
    )


_ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _permuted("llama", (*_SEPARATE, _ROUTER), _EXPERTS),  # Mixtral too
        _permuted("mistral3"),
        _permuted("smollm3"),
        _permuted("granite"),
        _permuted("granitemoe", (*_SEPARATE_QKV, "block_sparse_moe.router"), "block_sparse_moe.experts"),
        Architecture(
            "llama4",
            parts=(
                *_SEPARATE_QKV,
                *(f"feed_forward.{part}" for part in _PROJECTIONS),
                *(f"feed_forward.shared_expert.{part}" for part in _PROJECTIONS),
                "feed_forward.router",
            ),
            experts="feed_forward.experts",
        ),
        Architecture("olmo2"),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("qwen2moe", parts=_QWEN_MOE, experts=_EXPERTS),
        Architecture("qwen3moe", parts=(*_SEPARATE_QKV, _ROUTER), experts=_EXPERTS),
        Architecture("olmoe", parts=(*_SEPARATE_QKV, _ROUTER), experts=_EXPERTS),
        Architecture("gemma"),
        Architecture("gemma2"),
        Architecture("gemma3"),
        Architecture(
            "gemma4",
            parts=(*_SEPARATE, "per_layer_input_gate", "per_layer_projection", "router.proj"),
            experts="experts",
            fuses_experts=True,
            expert_scales="router.per_expert_scale",
            ignored={
                "model.per_layer_model_projection": "per_layer_model_proj",
                "model.embed_tokens_per_layer": "per_layer_token_embd",
            },
        ),
        Architecture("phi3", parts=_FUSED),
        # Of models that also see, rows of queries and keys are in the order that Hugging Face has elsewhere.
        Architecture(
            "glm4", parts=(*_SEPARATE_QKV, "mlp.gate_up_proj", "mlp.down_proj"), unlike="rope.dimension_sections"
        ),
        Architecture(
            "glm4moe",
            parts=(*_SEPARATE, _ROUTER, *(f"mlp.shared_experts.{part}" for part in _PROJECTIONS)),
            unlike="rope.dimension_sections",
            experts=_EXPERTS,
        ),
        Architecture("qwen2vl"),
        Architecture("qwen3vl"),
        _gated_delta("qwen35", _SEPARATE),
        _gated_delta("qwen35moe", _QWEN_MOE, _EXPERTS),
        Architecture(
            "qwen3next",
            parts=(*_QWEN_MOE, _QKVZ, "linear_attn.in_proj_ba", "linear_attn.out_proj"),
            rows={_QKVZ: gguf_orders.gates_last},
            spread={_QKVZ: Spread(("attn_qkv", "attn_gate"), gguf_orders.heights_with_gates)},
            counts=("key_heads", "key_size"),
            experts=_EXPERTS,
        ),
        Architecture("gpt-oss", parts=(*_SEPARATE_QKV, "mlp.router"), experts=_EXPERTS),
        Architecture("lfm2", parts=_LFM2),
        Architecture("lfm2moe", parts=(*_LFM2, "feed_forward.gate"), experts="feed_forward.experts"),
        # Without mixer.out_proj, which PEFT does not adapt.
        Architecture(
            "nemotron_h_moe",
            parts=(
                *("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj", "mixer.in_proj", "mixer.gate"),
                *("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"),
            ),
            experts="mixer.experts",
            has_gates=False,
        ),
        # Without mamba.dt_proj, of which transformers ignores updates, and mamba.out_proj, which PEFT does not adapt.
        Architecture(
            "jamba",
            parts=(
                *_SEPARATE_QKV,
                *("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
                *("feed_forward.router", "mamba.in_proj", "mamba.x_proj"),
            ),
            experts="feed_forward.experts",
        ),
        _FALCON_H1,
    )
}


def architecture(name: str | None, where: str) -> Architecture:
    """Look up an architecture by its GGUF name; ``where`` is the file that says it.

    Raises:
        RefusedError: it is not on the list.
    """
    if name not in _ARCHITECTURES:
        raise RefusedError(
            f"{where}: architecture {_shown(name)} is not supported"
            + (why_not(name) or f"; supported are {_listed(_ARCHITECTURES)}")
        )
    return _ARCHITECTURES[name]


def architecture_of_config(config: Mapping[str, Any], where: str) -> Architecture:
    """Look up an architecture by a Hugging Face configuration.

    Raises:
        RefusedError: it is not on the list.
    """
    outer, text = config.get("model_type"), config.get("text_config")
    model_type = f"{outer} ({text.get('model_type')})" if isinstance(text, dict) else outer
    if model_type == "nemotron_h" and not config.get("num_experts_per_tok"):
        model_type = "nemotron_h (without experts)"  # another architecture in llama.cpp
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise RefusedError(
            f"{where}: no GGUF layout is supported for model_type {_shown(model_type)}"
            + (why_not(model_type) or f"; supported are {_listed(MODEL_TYPES)}")
        )
    return _ARCHITECTURES[MODEL_TYPES[model_type]]


def layer_of(module: str) -> int | None:
    """Return the number of a module's layer; None if it lies in none."""
    found = _IN_LAYER.fullmatch(module)
    return int(found["layer"]) if found else None


def _part(module: str) -> str:
    found = _IN_LAYER.fullmatch(module)
    return found["part"] if found else module


def _rename(name: str, stem: str, new_stem: str, parts: dict[str, str]) -> str | None:
    found = _IN_LAYER.fullmatch(name)
    part = parts.get(found["part"]) if found and found["stem"] == stem else None
    return f"{new_stem}.{found['layer']}.{part}" if found and part else None


@cache
def _part_names(architecture: str, parts: tuple[str, ...]) -> dict[str, str]:
    """What follows the layer's number in GGUF names, by part."""
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = TensorNameMap(MODEL_ARCH(arch), 1)
    names = {}
    for part in parts:
        spelled = _SPELLED_IN_GGUF.get(part, part)
        name = table.get_name(f"model.layers.0.{spelled}") or table.get_name(f"backbone.layers.0.{spelled}")
        if name is None:
            raise BuildError(f"the installed gguf has no name for {part} of {architecture}; install gguf 0.19")
        names[part] = name.removeprefix("blk.0.")
    return names


def _shown(name: object) -> str:
    return repr(name)[:80]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
