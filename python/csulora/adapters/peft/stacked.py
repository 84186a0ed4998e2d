"""PEFT's factors of parameters that hold all experts of a layer: ``target_parameters``.

For E experts and rank r, A is (E r, in), its rows expert by expert, and B is (out, r E), its columns rank by rank
with the expert running fastest (PEFT 0.21, ``ParamWrapper``). PEFT wraps an experts module once per parameter, so that
the factors of the first one lie under ``experts.base_layer`` if two are adapted. With one, only
``target_parameters`` says which.

Unsloth's B had its columns expert by expert until September 2026, as the rows of A.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from csulora.adapters.experts import DOWN, GATE_UP, UP, is_fused, is_targeted
from csulora.adapters.lora import Adapter, LoraModule
from csulora.adapters.weights_files import MOST_UPDATES
from csulora.errors import InputError, NotPlainLoraError, TooLargeError
from csulora.models.names import parse_expert

_WRAPPED = ".base_layer"
_EXPERTS = re.compile(r"(?:.*\.)?experts")
_ORDER = (GATE_UP, UP, DOWN)  # in which every model has its parameters


def parameter_names(modules: Iterable[str], config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return which parameter of experts each pair of factors is for, by the module name in the file.

    Args:
        modules: names under which the file holds factors, among them those of other modules.
        config: the adapter's configuration.
        path: the file, for messages.

    Raises:
        RefusedError: it does not follow from the configuration which parameters these are.
    """
    wanted = config.get("target_parameters") or []
    levels: dict[str, list[str]] = {}
    for module in modules:
        owner = module
        while owner.endswith(_WRAPPED):
            owner = owner.removesuffix(_WRAPPED)
        if owner != module or _EXPERTS.fullmatch(owner):
            levels.setdefault(owner, []).append(module)
    found: dict[str, str] = {}
    for owner, keys in levels.items():
        targeted = [f"{owner}.{name}" for name in _ORDER if is_targeted(f"{owner}.{name}", wanted)]
        innermost_first = sorted(keys, key=len, reverse=True)
        if not _EXPERTS.fullmatch(owner) or [len(key) for key in innermost_first] != [
            len(owner) + len(_WRAPPED) * level for level in reversed(range(len(targeted)))
        ]:
            raise NotPlainLoraError(
                f"{path}: holds factors for {', '.join(keys)}, and target_parameters names {len(targeted)} parameters "
                f"of {owner}; csulora corrects factors of {', '.join(_ORDER)} of modules called experts"
            )
        found |= dict(zip(innermost_first, targeted, strict=True))
    return found


def apart(
    parameter: str, a: torch.Tensor, b: torch.Tensor, rank: int, scale: float, order: str, path: Path
) -> Iterator[tuple[str, LoraModule]]:
    """Yield the update of each expert, under the parameter's name with the expert in it.

    Args:
        parameter: its name.
        a: (E rank, in).
        b: (out, rank E).
        rank: of each expert's update.
        scale: of each expert's update.
        order: of the columns of ``b``, see `csulora.adapters.peft.config.column_order`.
        path: the file, for messages.

    Raises:
        InputError: the factors do not hold a whole number of experts, or not the same.
        RefusedError: they hold more experts than an adapter may update.
    """
    experts = a.shape[0] // rank
    if a.shape[0] != experts * rank or b.shape[1] != experts * rank:
        raise InputError(
            f"{path}: {parameter} has factors {list(a.shape)} and {list(b.shape)}, no whole number of experts "
            f"of the configuration's rank {rank}"
        )
    if experts > MOST_UPDATES:
        raise TooLargeError(f"{path}: {parameter} has factors of {experts} experts; at most {MOST_UPDATES} are read")
    owner, _, projection = parameter.rpartition(".")
    rows = b.shape[0]
    # At once, since a column at a time would read a whole line of memory for each number.
    if order == "unsloth":
        columns = b.reshape(rows, experts, rank).transpose(0, 1).contiguous()  # (E, out, r)
    else:
        columns = b.reshape(rows * rank, experts).t().contiguous().view(experts, rows, rank)
    for expert in range(experts):
        update = LoraModule(columns[expert], a[expert * rank : (expert + 1) * rank], scale)
        yield f"{owner}.{expert}.{projection}", update


def gathered(adapter: Adapter) -> tuple[dict[str, list[LoraModule]], dict[str, LoraModule]]:
    """Sort modules into fused parameters, expert by expert, and others, among them experts that are not fused.

    Raises:
        InputError: an expert is missing.
    """
    if not is_fused(adapter):
        return {}, adapter.modules
    experts: dict[str, dict[int, LoraModule]] = {}
    others: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        if (found := parse_expert(name)) is None:
            others[name] = module
        else:
            experts.setdefault(f"{found[0]}.{found[2]}", {})[found[1]] = module
    for parameter, updates in experts.items():
        if missing := set(range(max(updates))) - set(updates):
            raise InputError(
                f"{adapter.path}: {parameter} has no update of expert {min(missing)}, and fused factors hold them all; "
                "write it per expert"
            )
    return {parameter: [updates[i] for i in sorted(updates)] for parameter, updates in experts.items()}, others


def names_in_file(parameters: Iterable[str]) -> dict[str, str]:
    """Return the module names under which the factors of parameters lie, the inverse of `parameter_names`."""
    owners: dict[str, list[str]] = {}
    for parameter in sorted(parameters, key=lambda name: _ORDER.index(name.rpartition(".")[2])):
        owners.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {
        parameter: owner + _WRAPPED * level
        for owner, wrapped in owners.items()
        for level, parameter in enumerate(reversed(wrapped))
    }


def together(updates: Sequence[LoraModule]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of all experts, scales folded into B; smaller ranks are filled with zeros."""
    rank = max(update.rank for update in updates)
    filled = [update.folded().padded(rank) for update in updates]
    b = torch.stack([update.b for update in filled])  # (E, out, r)
    rows = b.shape[1]
    return torch.cat([update.a for update in filled]), b.flatten(1).t().reshape(rows, rank * len(filled))
