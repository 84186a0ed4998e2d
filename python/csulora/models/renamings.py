"""What transformers calls a weight in memory, where that is not its name on disk.

Mixtral's router is ``block_sparse_moe.gate`` on disk and ``mlp.gate`` in the model that an adapter is trained on. The
table is transformers' own, see `.ci/renamings.py`, so that transformers need not be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from csulora.errors import RefusedError
from csulora.models.names import WEIGHT

_TABLE = Path(__file__).with_name("renamings.json")

# Where a class with a head keeps the model, and a model that also sees or hears its language model.
_MODEL = re.compile(r"(model\.)?")
_LANGUAGE_MODEL = re.compile(r"((model|language_model|text_model)\.)+")

Rules = tuple[tuple[re.Pattern[str], str], ...]


@cache
def _document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return found


@cache
def _table(which: Literal["rules", "within"]) -> dict[str, Rules]:
    rules = _document()[which]
    return {kind: tuple((re.compile(source), target) for source, target in found) for kind, found in rules.items()}


def names_in_memory(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, str]:
    """Return the modules that transformers calls otherwise: name in memory -> name on disk.

    Args:
        config: what the checkpoint's config.json holds.
        modules: all of its modules, as on disk.

    Raises:
        RefusedError: two modules would have one name in memory.

    >>> names_in_memory({"model_type": "mixtral"}, ["model.layers.0.block_sparse_moe.gate"])
    {'model.layers.0.mlp.gate': 'model.layers.0.block_sparse_moe.gate'}
    """
    owners: dict[str, str] = {}
    for module in modules:
        name = _in_memory(config, module)
        if (other := owners.setdefault(name, module)) != module:
            raise RefusedError(
                f"transformers calls both {other} and {module} {name}; which of the two an adapter means cannot be told"
            )
    return {name: module for name, module in owners.items() if name != module}


def experts_of(model_type: str | None) -> Literal["converted", "dropped"] | None:
    """Return what PEFT does with factors of single experts of a model that transformers loads with stacked experts."""
    fate: Literal["converted", "dropped"] | None = _document()["experts"].get(model_type)
    return fate


def _in_memory(config: Mapping[str, Any], module: str) -> str:
    classes, text = config.get("architectures"), config.get("text_config")
    table, model_type = _table("rules"), config.get("model_type")
    kinds = [*(classes if isinstance(classes, list) else []), model_type]
    whole: Rules = next((table[kind] for kind in kinds if isinstance(kind, str) and kind in table), ())
    inner = text.get("model_type") if isinstance(text, dict) else None
    name = _renamed(module + WEIGHT, whole)
    if isinstance(model_type, str):
        name = _renamed_within(_MODEL, name, _table("within").get(model_type, ()))
    if isinstance(inner, str) and inner != model_type:
        name = _renamed_within(_LANGUAGE_MODEL, name, table.get(inner, ()))
    return name.removesuffix(WEIGHT)


def _renamed_within(prefix: re.Pattern[str], name: str, rules: Rules) -> str:
    """Apply the rules of a model inside another to what follows its prefix."""
    found = prefix.match(name)
    return found[0] + _renamed(name[found.end() :], rules) if found else name


def _renamed(name: str, rules: Rules) -> str:
    """Apply every rule that matches, in order, as transformers does."""
    for source, target in rules:
        if found := source.search(name):
            replacement = target.replace(r"\1", found[1]) if r"\1" in target else target
            name = name.replace(found[0], replacement, 1)
    return name
