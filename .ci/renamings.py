"""What transformers renames as it loads a language model, as a table that csulora can read without transformers.

    python .ci/renamings.py

Writes python/csulora/models/renamings.json. It holds renamings of single weights only: what transformers stacks, splits
or transposes as it loads is no matter of names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.models.auto import modeling_auto

TABLE = Path(__file__).parents[1] / "python" / "csulora" / "models" / "renamings.json"
_LANGUAGE_MODELS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


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


def table() -> dict[str, Any]:
    """Return the rules of every class and model type of a language model that has some."""
    kinds: set[str] = set()
    for mapping in _LANGUAGE_MODELS:
        for model_type, classes in getattr(modeling_auto, mapping).items():
            kinds |= {model_type, *([classes] if isinstance(classes, str) else classes)}
    found = {kind: rules(kind) for kind in sorted(kinds)}
    return {"transformers": transformers.__version__, "rules": {kind: rule for kind, rule in found.items() if rule}}


def text() -> str:
    """Return the table as it stands in its file: a rule per line."""
    found = table()
    kinds = [
        f"  {json.dumps(kind)}: [\n" + ",\n".join(f"   {json.dumps(rule)}" for rule in rules) + "\n  ]"
        for kind, rules in found["rules"].items()
    ]
    return f'{{\n "transformers": "{found["transformers"]}",\n "rules": {{\n' + ",\n".join(kinds) + "\n }\n}\n"


if __name__ == "__main__":
    TABLE.write_text(text())
