"""What transformers renames as it loads a language model, as a table that csulora can read without transformers.

    python .ci/renamings.py

Writes python/csulora/models/renamings.json. It holds renamings of single weights only: what transformers stacks, splits
or transposes as it loads is no matter of names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import transformers
from peft.utils import transformers_weight_conversion as peft_conversion
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, PrefixChange, WeightRenaming
from transformers.models.auto import modeling_auto

TABLE = Path(__file__).parents[1] / "python" / "csulora" / "models" / "renamings.json"
_LANGUAGE_MODELS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)


def rules(kind: str) -> list[list[str]]:
    """Return pairs of an expression and what takes its place, in order, for a class or a model type."""
    found = get_checkpoint_conversion_mapping(kind) or []
    renamings = [rule for rule in found if type(rule) in (WeightRenaming, PrefixChange)]
    return [
        [_bounded(source), rule.target_patterns[0]]
        for rule in renamings
        if len(rule.target_patterns) == 1
        for source in rule.source_patterns
    ]


def _bounded(source: str) -> str:
    """Return what transformers matches with: ``*.`` is any text, and a name ends where the expression does."""
    expression = source.replace("*.", r".*\.")
    return expression + (r"(?!\w)" if expression[-1].isalnum() and expression[-1].isascii() else "")


def experts(kind: str) -> str | None:
    """Return what PEFT does with factors of single experts where transformers stacks them: converts or drops them."""
    found = get_checkpoint_conversion_mapping(kind) or []
    operations = [operation for rule in found for operation in getattr(rule, "operations", [])]
    if not any(isinstance(operation, MergeModulelist) for operation in operations):
        return None
    private = vars(peft_conversion)
    pattern = private["_MODEL_TO_CONVERSION_PATTERN"].get(kind)
    return "converted" if pattern in private["_MOE_TARGET_MODULE_MAPPING"] else "dropped"


def table() -> dict[str, Any]:
    """Return the rules of every class and model type of a language model, and of the class without a head within it."""
    kinds: set[str] = set()
    for mapping in _LANGUAGE_MODELS:
        for model_type, classes in getattr(modeling_auto, mapping).items():
            kinds |= {model_type, *([classes] if isinstance(classes, str) else classes)}
    found = {kind: rules(kind) for kind in sorted(kinds)}
    bare = {kind: name for kind, name in modeling_auto.MODEL_MAPPING_NAMES.items() if isinstance(name, str)}
    within = {kind: rules(bare[kind]) for kind in sorted(kinds & bare.keys())}
    return {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "experts": {kind: fate for kind in sorted(kinds) if (fate := experts(kind))},
        "rules": {kind: rule for kind, rule in found.items() if rule},
        "within": {kind: rule for kind, rule in within.items() if rule},
    }


def text() -> str:
    """Return the table as it stands in its file: a rule per line."""
    found = table()
    head = [f" {json.dumps(key)}: {json.dumps(found[key])}" for key in ("transformers", "peft")]
    fates = [f"  {json.dumps(kind)}: {json.dumps(fate)}" for kind, fate in found["experts"].items()]
    parts = [*head, _object("experts", fates), *(_object(key, _lists(found[key])) for key in ("rules", "within"))]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lists(found: dict[str, list[list[str]]]) -> list[str]:
    return [
        f"  {json.dumps(kind)}: [\n" + ",\n".join(f"   {json.dumps(rule)}" for rule in rules) + "\n  ]"
        for kind, rules in found.items()
    ]


def _object(name: str, lines: list[str]) -> str:
    return f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }"


if __name__ == "__main__":
    TABLE.write_text(text())
