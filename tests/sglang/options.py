"""How SGLang is started on a CPU."""

from typing import Any

ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "lora_backend": "torch_native",
    "enable_lora": True,
    "max_lora_rank": 16,
    "max_loras_per_batch": 2,
    "max_loaded_loras": 2,
    "lora_target_modules": ["all"],
    "disable_radix_cache": True,
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "mem_fraction_static": 0.2,
    "max_total_tokens": 2048,
    "skip_server_warmup": True,
}


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings of an engine as options of a command."""
    words = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, *map(str, value if isinstance(value, list) else [value])]
    return words
