"""Write small transformers models as GGUF files in float32, for tests and the demo.

    python bench/demo/model_to_gguf.py MODEL_DIRECTORY FILE.gguf

Knows the architectures that csulora exports adapters for, with default rotary embeddings, and of a tokenizer only
the list of words: prompts must be given as token ids. Other models need llama.cpp's own converter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TensorNameMap, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from csulora.models.gguf_layout import architecture_of_model_type, to_rotary_order

# Their norms multiply by 1 + weight, and llama.cpp's by weight.
OFFSET_NORMS = ("gemma", "gemma2", "gemma3")


def theta(config: PretrainedConfig, layer_type: str) -> float:
    """The base of the rotary frequencies in layers of one type."""
    parameters = config.rope_parameters.get(layer_type, config.rope_parameters)
    if parameters["rope_type"] != "default":
        raise ValueError(f"rotary embeddings of type {parameters['rope_type']} are not supported")
    return float(parameters["rope_theta"])


def add_settings(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Write what llama.cpp must know of the model besides its weights."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(theta(config, "full_attention"))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", theta(config, "sliding_attention"))
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_words(writer: GGUFWriter, words: Sequence[str], special: Iterable[int], bos: int, eos: int) -> None:
    """Write a vocabulary that turns ids into words; it is not meant to turn text into ids."""
    special = set(special)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(words))])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)


def add_weights(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """Write every weight under llama.cpp's name and in its layout."""
    config = model.config
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == writer.arch)
    names = TensorNameMap(MODEL_ARCH(arch), config.num_hidden_layers)
    layout = architecture_of_model_type(config.model_type, "the model")
    for key, stored in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        tensor = stored.detach().float()
        if writer.arch in OFFSET_NORMS and module.endswith("norm"):
            tensor = tensor + 1
        if layout.is_permuted(module):
            heads = config.num_key_value_heads if module.endswith("k_proj") else config.num_attention_heads
            tensor = to_rotary_order(tensor, heads)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", tensor.contiguous().numpy())


def convert(model: PreTrainedModel, path: Path, name: str, words: Sequence[str] | None = None) -> Path:
    """Write a model as a GGUF file."""
    config = model.config
    writer = GGUFWriter(path, architecture_of_model_type(config.model_type, "the model").name)
    writer.add_type("model")
    writer.add_name(name)
    add_settings(writer, config)
    words = words or [f"<{i}>" for i in range(config.vocab_size)]
    add_words(
        writer, words, range(config.bos_token_id, config.eos_token_id + 1), config.bos_token_id, config.eos_token_id
    )
    add_weights(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main() -> None:
    """Convert a directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(arguments.model).convert_ids_to_tokens(list(range(model.config.vocab_size)))
    convert(model, arguments.file, arguments.model.resolve().name, words)


if __name__ == "__main__":
    main()
