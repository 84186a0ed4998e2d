"""What a Hugging Face model directory says of the GGUF file that is made of it: architecture, counts and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import metadata_load

from csulora.errors import InputError
from csulora.io.files import parse_json, read_regular
from csulora.models import experts, gguf_experts, gguf_layout, names, renamings, storage
from csulora.models.gguf_layout import EMBEDDING, HEAD, Architecture
from csulora.models.gguf_orders import SOURCES, Source
from csulora.models.shards import check_is_model, stored_tensors

MOST_LAYERS = 10_000
_LARGEST_CONFIG = 16 << 20  # bytes

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_REGULAR_PARTS = frozenset(
    {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
)
_ROUTER = "mlp.gate"  # of models that also come without experts


class Description(NamedTuple):
    """What `BaseModel` keeps of a directory."""

    architecture: Architecture
    counts: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    multipliers: dict[str, float]
    license: str | None


def describe(directory: Path) -> Description:
    """Read ``config.json``, and the headers of the weights where it does not tell all shapes.

    Raises:
        InputError: a file is missing or malformed.
        RefusedError: the architecture is not supported.
    """
    check_is_model(directory)
    path = directory / "config.json"
    config = parse_json(read_regular(path, _LARGEST_CONFIG), path)
    architecture = gguf_layout.architecture_of_config(config, str(path))
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    counts = read_counts(architecture, str(path), lambda source: source.config, text.get)
    shapes = _shapes(directory, config, text, architecture)
    multipliers = {
        module: math.prod(_multiplier(path, text, key) for key in architecture.multiplied_by(module))
        for module in shapes
        if architecture.multipliers
    }
    if architecture.expert_scales and any(map(architecture.is_expert, shapes)):
        multipliers |= _expert_scales(directory, architecture)
    return Description(architecture, counts, shapes, multipliers, _license(directory / "README.md"))


def read_counts(
    architecture: Architecture, where: str, key_of: Callable[[Source], str], read: Callable[[str], Any]
) -> dict[str, int]:
    """Return an architecture's counts, by name.

    Args:
        architecture: what needs them.
        where: what messages call the place.
        key_of: returns the key of a count there.
        read: returns the value of a key, None if there is none.
    """
    counts: dict[str, int] = {}
    for name in architecture.counts:
        source = SOURCES[name]
        key = key_of(source)
        value = read(key)
        if value is None and source.default:
            value = counts[source.default]
        counts[name] = _count(value, f"{where}: {key}")
    return counts


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} is {value}; a positive number is needed")
    return value


def _multiplier(path: Path, config: Mapping[str, Any], key: str) -> float:
    name, _, index = key.partition(".")
    value = config.get(name)
    if index and isinstance(value, list) and len(value) > int(index):
        value = value[int(index)]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not value:
        raise InputError(f"{path}: {name} is {config.get(name)}; numbers other than 0 are needed")
    return float(value)


def _tells_shapes(config: Mapping[str, Any], architecture: Architecture) -> bool:
    has_experts = architecture.experts and any(config.get(key) for key in _NUMBERS_OF_EXPERTS)
    return (
        not has_experts
        and set(architecture.parts) - {_ROUTER} <= _REGULAR_PARTS
        and all(config.get(key) is not None for key in _SIZES)
    )


def _holds_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors"))


def _shapes(
    directory: Path, config: Mapping[str, Any], text: Mapping[str, Any], architecture: Architecture
) -> dict[str, tuple[int, int]]:
    """Return the shapes of the language model's weights, without the head if it is the token embedding."""
    told = [each.get("tie_word_embeddings") for each in (config, text)]
    is_told = any(isinstance(tie, bool) for tie in told)
    is_enough = _tells_shapes(text, architecture)
    needs_weights = _holds_weights(directory) and not (is_enough and is_told)
    stored = _stored_shapes(directory, config, architecture) if needs_weights else {}
    shapes = stored if stored and not is_enough else _computed_shapes(directory / "config.json", text, architecture)
    has_head = any(tie is False for tie in told) if is_told else HEAD in stored
    return {module: shape for module, shape in shapes.items() if module != HEAD or has_head}


def _computed_shapes(path: Path, config: Mapping[str, Any], architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Compute the shapes of a model all of whose layers are alike."""
    missing = ", ".join(f"{key} is None" for key in _SIZES if config.get(key) is None)
    if missing or not _tells_shapes(config, architecture):
        raise InputError(
            f"{path}: does not tell all shapes of a {architecture.name} model{missing and f' ({missing})'}; "
            "name a local directory that holds the weights too, or the GGUF file"
        )

    def count(key: str, default: int | None = None) -> int:
        value = config.get(key)
        return _count(default if value is None else value, f"{path}: {key}")

    width, hidden, layers = count("hidden_size"), count("intermediate_size"), count("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise InputError(f"{path}: num_hidden_layers is {layers}; at most {MOST_LAYERS} are possible")
    heads = count("num_attention_heads")
    kv_heads = count("num_key_value_heads", heads)
    head = count("head_dim", width // heads)
    in_layer = {
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.qkv_proj": ((heads + 2 * kv_heads) * head, width),
        "self_attn.o_proj": (width, heads * head),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.gate_up_proj": (2 * hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    parts = [part for part in architecture.parts if part in in_layer]
    shapes = {f"model.layers.{layer}.{part}": in_layer[part] for layer in range(layers) for part in parts}
    return shapes | dict.fromkeys((EMBEDDING, HEAD), (count("vocab_size"), width))


def _stored_shapes(
    directory: Path, config: Mapping[str, Any], architecture: Architecture
) -> dict[str, tuple[int, int]]:
    """Read the shapes of the language model's weights from the headers of the files, whatever class wraps it."""
    stored = storage.logical_shapes(stored_tensors(directory))
    matrices = {name: (shape[0], shape[1]) for name, shape in stored.items() if len(shape) == 2}
    matrices |= {name: part.shape for name, part in experts.parts(stored, architecture.expert_layout)}
    in_memory = {on_disk: name for name, on_disk in renamings.names_in_memory(config, matrices).items()}
    shapes = {}
    for name, shape in matrices.items():
        in_model = in_memory.get(name, name)
        # The first of them calls Mixtral's experts as transformers does, the second Granite's.
        for bare in (names.bare(in_model), names.without_wrappers(in_model)):
            module = bare if bare == HEAD else f"model.{bare}"
            if architecture.tensor_name(module) or architecture.is_expert(module):
                shapes[module] = shape
    return shapes


def _expert_scales(directory: Path, architecture: Architecture) -> dict[str, float]:
    """Read what transformers multiplies the outputs of experts by, by module."""
    found: dict[str, float] = {}
    for tensor, stored in stored_tensors(directory).items():
        module = f"model.{names.bare(tensor)}"
        layer = gguf_layout.layer_of(module)
        if layer is not None and module == f"model.layers.{layer}.{architecture.expert_scales}":
            scales = storage.read(stored.file, tensor).float()
            found |= gguf_experts.multipliers(layer, architecture.experts, scales, f"{stored.file}: {tensor}")
    return found


def _license(card: Path) -> str | None:
    """The licence that a model card states, if there is a card and it can be read."""
    try:
        value = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except Exception:  # of the card's text, of its YAML, of its encoding: none of them matters here
        return None
    return value if isinstance(value, str) else None
