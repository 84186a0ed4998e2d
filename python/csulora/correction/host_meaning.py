"""What hosts make of an adapter's names, where that is not what its file says.

Measured on PEFT 0.21.2 with transformers 5.23: every such adapter was loaded, and what arrived in the model was
compared with the file. PEFT says nothing, or warns of missing keys, and goes on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from csulora.adapters.expert_encoding import FUSED, PER_EXPERT, Layout
from csulora.adapters.experts import is_fused
from csulora.adapters.lora import Adapter
from csulora.models import renamings
from csulora.models.names import bare, is_expert
from csulora.subspace.subspace import Subspace

HOST = "PEFT 0.21 on transformers 5"

_DROPPED_OUTSIDE_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_proj", "up_proj", "w1", "w3")

# The one old spelling that PEFT loads as it stands.
_STILL_LOADED = re.compile(r"language_model\.model\.")


def todays_names(covered: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Return what to call modules that an adapter names as the checkpoint does, and transformers 5 does not.

    Where more than wrappers differ, hosts disagree, and the adapter's own name is kept.

    Args:
        covered: name in the adapter -> module in the subspace file.
        names: name in memory -> module in the subspace file, see `Subspace.names`.
    """
    in_memory = {module: name for name, module in names.items()}
    return {
        name: in_memory[target]
        for name, target in covered.items()
        if name == target and target in in_memory and bare(in_memory[target]) == bare(target)
    }


def host_notes(
    adapter: Adapter, covered: Mapping[str, str], subspace: Subspace, layout: Layout | None
) -> tuple[str, ...]:
    """Return a line for each way in which a host would not apply an adapter as its file says; PEFT reads none of MLX.

    Args:
        adapter: as it was read.
        covered: name in the adapter -> module in the subspace file.
        subspace: the subspace file of the model.
        layout: in which experts are to be written; None: as they came.
    """
    return tuple(_notes(adapter, covered, subspace, layout)) if adapter.format != "mlx" else ()


def _notes(adapter: Adapter, covered: Mapping[str, str], subspace: Subspace, layout: Layout | None) -> Iterator[str]:
    renamed = todays_names(covered, subspace.names)
    old = set(subspace.names.values())
    if lost := [name for name in renamed if not _STILL_LOADED.match(name)]:
        yield (
            f"{HOST} drops {_count(lost, adapter)}, which has the name that transformers 4 gave it; "
            "what csulora correct writes has the names of today"
        )
    if lost := [name for name, target in covered.items() if name == target and target in old and name not in renamed]:
        yield (
            f"{HOST} drops {_count(lost, adapter)}, which is named as on disk; "
            "serve it with vLLM, or train it again on transformers 5"
        )
    fate, experts = renamings.experts_of(subspace.provenance.model_type), subspace.provenance.experts
    is_dropped = fate == "dropped" or (experts is not None and experts.dropped_by_peft)
    yield from _expert_notes(adapter, "dropped" if is_dropped else fate, layout)


def _expert_notes(adapter: Adapter, fate: str | None, layout: Layout | None) -> Iterator[str]:
    experts = (
        [] if is_fused(adapter) and layout != PER_EXPERT else [name for name in adapter.modules if is_expert(name)]
    )
    if fate == "dropped" and experts:
        yield f"{HOST} drops {_count(experts, adapter)}, an expert's; serve it with vLLM, or use --layout {FUSED}"
    if is_fused(adapter):
        experts = []  # what csulora writes has scale 1 and no patterns
    if fate != "converted":
        return
    outside = [name for name in adapter.modules if name.endswith(_DROPPED_OUTSIDE_EXPERTS) and not is_expert(name)]
    if outside:
        yield (
            f"{HOST} drops {_count(outside, adapter)}, of a dense layer or a shared expert, since it takes the name "
            "for that of routed experts; serve it with vLLM"
        )
    if fused := [name for name in experts if name.endswith(_FUSED)]:
        yield from _scale_notes(adapter, fused)


def _scale_notes(adapter: Adapter, fused: Collection[str]) -> Iterator[str]:
    if adapter.config.get("use_rslora"):
        yield (
            f"{HOST} applies {_count(fused, adapter)} sqrt(2) times too large, since rsLoRA sees the rank of gate and "
            "up together; what csulora correct writes has scale 1"
        )
    if adapter.config.get("alpha_pattern"):
        yield (
            f"{HOST} forgets the alpha_pattern of {_count(fused, adapter)}; "
            "what csulora correct writes has scale 1 and needs none"
        )


def _count(names: Collection[str], adapter: Adapter) -> str:
    return f"{len(names)} of {len(adapter.modules)} modules, such as {min(names)}"
