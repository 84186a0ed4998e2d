"""A model's weights under llama.cpp's names and in its layout, in float32."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap
from gguf_settings import rotary
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector

from csulora.models import gguf_orders, names
from csulora.models.gguf_layout import HEAD, Architecture
from csulora.models.gguf_orders import SOURCES

# Their norms multiply by 1 + weight, and llama.cpp's by weight.
OFFSET_NORMS = ("gemma", "gemma2", "gemma3", "qwen35", "qwen35moe", "qwen3next")
_TOWERS = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower", "embed_vision")

# Names that gguf's table knows otherwise.
_SPELLINGS = {
    "block_sparse_moe.router": "block_sparse_moe.router.layer",
    "dt_bias": "dt_proj.bias",
    "layer_scalar": "layer_scalar.weight",
    "self_attn.sinks": "self_attn.sinks.weight",
    "e_score_correction_bias": "e_score_correction.bias",
    "feed_forward.expert_bias": "feed_forward.expert_bias.bias",
}
_SPELLED = re.compile("|".join(_SPELLINGS))
# Gemma 4's, of which gguf's table has no names.
_ROUTER = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
_IN_ROUTER = re.compile(rf"layers\.(?P<layer>\d+)\.(?P<scale>{'|'.join(_ROUTER)})")

_EXPERTS = re.compile(
    r"layers\.(?P<layer>\d+)\..*\bexperts\.(?P<parameter>gate_up_proj|up_proj|down_proj)(?P<bias>_bias)?"
)

# Orders of what is no weight matrix.
_OTHER_ORDERS = {
    "A_log": gguf_orders.value_heads,
    "dt_proj.bias": gguf_orders.value_heads,
    "conv1d.weight": gguf_orders.values_last,
}


def tensors(model: PreTrainedModel, layout: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of every tensor of the language model."""
    config = model.config.get_text_config()
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == layout.name)
    table = TensorNameMap(MODEL_ARCH(arch), config.num_hidden_layers)
    (embedding,) = model.get_input_embeddings().parameters()
    for key, stored in model.state_dict().items():
        bare = _SPELLED.sub(lambda found: _SPELLINGS[found[0]], names.bare(key))
        is_tied = bare == f"{HEAD}.weight" and stored.data_ptr() == embedding.data_ptr()
        if is_tied or bare.startswith(_TOWERS):
            continue
        if found := _IN_ROUTER.fullmatch(bare):
            yield f"blk.{found['layer']}.{_ROUTER[found['scale']]}", stored.detach().float()
            continue
        if found := _EXPERTS.fullmatch(bare):
            yield from _experts(found, stored.detach().float(), layout)
            continue
        module = bare if bare.startswith(HEAD) else f"model.{bare}"
        name = _name(table, module)
        if name is None:
            raise ValueError(f"{key}: {layout.name} has no name for it")
        tensor = _in_layout(module, stored.detach().float(), config, layout)
        if (spread := layout.spread_of(module.rpartition(".")[0])) is None:
            yield name, tensor
        else:
            heights = spread.heights(_counts(config, layout), len(tensor))
            for piece, rows in zip(spread.tensors, tensor.split_with_sizes(heights), strict=True):
                yield f"{piece}.weight", rows
    if layout.name == "gemma4":
        yield "rope_freqs.weight", _gemma4_frequencies(config)


def _name(table: TensorNameMap, tensor: str) -> str | None:
    """Find a tensor under the name of today, or under that of the family's own code."""
    for spelling in (tensor, tensor.replace("model.", "backbone.", 1)):
        if name := table.get_name(spelling, try_suffixes=(".weight", ".bias")):
            return name
    return None


def _experts(name: re.Match[str], stacked: Tensor, layout: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of all experts of a layer, (E, out, in), or their biases, (E, out)."""
    kind = "bias" if name["bias"] else "weight"
    if layout.name in ("gpt-oss", "llama4") and kind == "weight":  # (E, in, out)
        stacked = stacked.transpose(1, 2)
    if name["parameter"] == "gate_up_proj" and not layout.fuses_experts:
        gate, up = (stacked[:, 0::2], stacked[:, 1::2]) if layout.expert_layout.interleaved else stacked.chunk(2, dim=1)
        held = {"gate": gate, "up": up}
    else:
        held = {name["parameter"].removesuffix("_proj"): stacked}
    for projection, tensor in held.items():
        yield f"blk.{name['layer']}.ffn_{projection}_exps.{kind}", tensor


def _in_layout(name: str, tensor: Tensor, config: PretrainedConfig, layout: Architecture) -> Tensor:
    module = name.rpartition(".")[0]
    counts = _counts(config, layout)
    if layout.name in OFFSET_NORMS and module.endswith("norm") and not module.endswith("linear_attn.norm"):
        return tensor + 1
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    if name.endswith("shared_expert_gate.weight"):
        return tensor[0]
    if tensor.dim() == 3:  # a convolution of every channel alone
        tensor = tensor.squeeze(1)
    others = _OTHER_ORDERS if "value_heads" in layout.counts else {}
    order = layout.row_order(module) or others.get(name.rpartition("linear_attn.")[2])
    if order is not None:
        tensor = tensor[order(counts, tensor.shape[0])]
    if (order := layout.column_order(module)) is not None:
        tensor = tensor[:, order(counts, tensor.shape[1])]
    if layout.name == "nemotron_h_moe" and name.endswith("mixer.norm.weight"):
        return tensor.reshape(config.n_groups, -1)
    if layout.name in ("falcon-h1", "nemotron_h_moe") and name.endswith(("A_log", "mamba.D", "mixer.D")):
        return tensor[:, None]  # vectors in other models
    return tensor * _multiplier(name, config) if layout.name == "falcon-h1" else tensor


def _counts(config: PretrainedConfig, layout: Architecture) -> dict[str, int]:
    return {name: getattr(config, SOURCES[name].config) for name in layout.counts}


def _multiplier(name: str, config: PretrainedConfig) -> float | Tensor:
    """What transformers multiplies Falcon-H1's activations with, and llama.cpp's converter the weights."""
    if name.endswith("mamba.in_proj.weight"):
        rows: Tensor = config.ssm_in_multiplier * compute_mup_vector(config)[0, 0, :, None]
        return rows
    attention, mlp = config.attention_in_multiplier, config.mlp_multipliers
    factors = {
        "q_proj": attention,
        "k_proj": attention * config.key_multiplier,
        "v_proj": attention,
        "o_proj": config.attention_out_multiplier,
        "gate_proj": mlp[0],
        "down_proj": mlp[1],
        "out_proj": config.ssm_out_multiplier,
        "embed_tokens": config.embedding_multiplier,
        "lm_head": config.lm_head_multiplier,
    }
    return float(factors.get(name.split(".")[-2], 1.0))


def _gemma4_frequencies(config: PretrainedConfig) -> Tensor:
    """Divisors of the rotary frequencies in layers with full attention, of which the last ones are not rotated."""
    half = config.per_layer_config[config.layer_types.index("full_attention")].head_dim // 2
    rotated = int(half * rotary(config)["partial_rotary_factor"])
    return torch.tensor([1.0] * rotated + [1e30] * (half - rotated))
