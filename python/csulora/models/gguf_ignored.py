"""Weights whose updates llama.cpp loads and then ignores: it multiplies with them without looking for adapters."""

from __future__ import annotations

from typing import NamedTuple

WAY_OUT = "train without it (exclude_modules), or merge the adapter into the model (merge_and_unload) and convert that"


class Ignoring(NamedTuple):
    """An architecture whose graph ignores updates of modules that adapters usually have."""

    modules: str
    model_types: tuple[str, ...]


_MLA = "q_a_proj, q_b_proj and kv_a_proj_with_mqa"
_LINEAR = "attention projections"

# By what GGUF's `general.architecture` says.
ARCHITECTURES = {
    "deepseek2": Ignoring(_MLA, ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")),
    "deepseek2-ocr": Ignoring(_MLA, ("deepseek_vl_v2",)),
    "deepseek32": Ignoring(_MLA, ("deepseek_v32",)),
    "mistral4": Ignoring(_MLA, ("mistral4", "mistral3 (mistral4)")),
    "glm-dsa": Ignoring(_MLA, ("glm_moe_dsa",)),
    "minicpm3": Ignoring(f"{_MLA} and kv_b_proj", ("minicpm3",)),
    "plm": Ignoring("q_proj, kv_a_proj_with_mqa and kv_b_proj", ("plm", "PLM")),
    "kimi-linear": Ignoring(_LINEAR, ("kimi_linear",)),
    "gemma3n": Ignoring(
        "altup_projections, altup_unembed_projections and modality_router",
        ("gemma3n", "gemma3n_text", "gemma3n (gemma3n_text)"),
    ),
}
_BY_MODEL_TYPE = {model_type: found for found in ARCHITECTURES.values() for model_type in found.model_types}


def why_not(name: object) -> str:
    """Say what llama.cpp ignores in models of an architecture or a model type; empty if nothing is known."""
    found = (ARCHITECTURES.get(name) or _BY_MODEL_TYPE.get(name)) if isinstance(name, str) else None
    if found is None:
        return ""
    return (
        f", because llama.cpp ignores updates of its {found.modules} without a word; merge the adapter into the model "
        "(merge_and_unload) and convert that"
    )
