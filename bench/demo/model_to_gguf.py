"""Write small transformers models as GGUF files in float32, for tests and the demo.

    python bench/demo/model_to_gguf.py MODEL_DIRECTORY FILE.gguf

Knows the architectures that csulora exports adapters for, and of a tokenizer only the list of words: prompts must be
given as token ids. Other models need llama.cpp's own converter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from gguf_settings import add_settings
from gguf_tensors import tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from csulora.models.gguf_layout import architecture_of_config


def convert(model: PreTrainedModel, path: Path, name: str, words: Sequence[str] | None = None) -> Path:
    """Write a model as a GGUF file; of one that also sees, the language model."""
    config = model.config.get_text_config()
    layout = architecture_of_config(model.config.to_dict(), "the model")
    writer = GGUFWriter(path, layout.name)
    writer.add_type("model")
    writer.add_name(name)
    add_settings(writer, config)
    words = words or [f"<{i}>" for i in range(config.vocab_size)]
    add_words(
        writer, words, range(config.bos_token_id, config.eos_token_id + 1), config.bos_token_id, config.eos_token_id
    )
    for tensor_name, tensor in tensors(model, layout):
        writer.add_tensor(tensor_name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
