"""A model's weights under llama.cpp's names and in its layout, in float32."""

from __future__ import annotations

from collections.abc import Iterator

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from csulora.models import names
from csulora.models.gguf_layout import HEAD, Architecture
from csulora.models.gguf_orders import SOURCES

# Their norms multiply by 1 + weight, and llama.cpp's by weight.
OFFSET_NORMS = ("gemma", "gemma2", "gemma3")
_TOWERS = ("vision_tower", "visual", "multi_modal_projector", "audio_tower", "embed_vision")


def tensors(model: PreTrainedModel, layout: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of every tensor of the language model."""
    config = model.config.get_text_config()
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == layout.name)
    table = TensorNameMap(MODEL_ARCH(arch), config.num_hidden_layers)
    (embedding,) = model.get_input_embeddings().parameters()
    for key, stored in model.state_dict().items():
        bare = names.bare(key)
        is_tied = bare == f"{HEAD}.weight" and stored.data_ptr() == embedding.data_ptr()
        if is_tied or bare.startswith(_TOWERS):
            continue
        module, _, kind = (bare if bare.startswith(HEAD) else f"model.{bare}").rpartition(".")
        name = table.get_name(module)
        if name is None:
            raise ValueError(f"{key}: {layout.name} has no name for it")
        yield f"{name}.{kind}", _in_layout(module, stored.detach().float(), config, layout)


def _in_layout(module: str, tensor: Tensor, config: PretrainedConfig, layout: Architecture) -> Tensor:
    if layout.name in OFFSET_NORMS and module.endswith("norm"):
        return tensor + 1
    counts = {name: getattr(config, SOURCES[name].config) for name in layout.counts}
    if (order := layout.row_order(module)) is not None:
        tensor = tensor[order(counts, tensor.shape[0])]
    if (order := layout.column_order(module)) is not None:
        tensor = tensor[:, order(counts, tensor.shape[1])]
    return tensor
