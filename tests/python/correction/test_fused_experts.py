"""Fused factors of experts that hosts could take for other experts' than csulora does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import csulora
import factories
from csulora.adapters.expert_encoding import LAYOUTS
from csulora.adapters.experts import decoded
from csulora.adapters.peft import directory
from csulora.adapters.peft.directory import parse
from csulora.errors import CsuloraError, InputError, RefusedError
from csulora.subspace.expert_layout import ExpertLayout

EXPERTS = "model.layers.0.mlp.experts"
PREFIX = "base_model.model."
NUMBER, HIDDEN, WIDTH = 4, 8, 6
PROJECTIONS = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LENIENT = csulora.Policy.none(keep_uncovered=("*",))


def subspace(number: int = NUMBER) -> csulora.Subspace:
    shapes = {f"{EXPERTS}.{e}.{name}": shape for e in range(number) for name, shape in PROJECTIONS.items()}
    found = factories.subspace(shapes, rank=2)
    found.provenance = replace(found.provenance, experts=ExpertLayout(per_expert=True))
    return found


def factors(module: str, rows: int, columns: int, rank: int = 2) -> dict[str, Tensor]:
    """Factors of ``rank``, which is the rank of all experts together if they are fused."""
    name = f"{PREFIX}{EXPERTS}{module}"
    return {
        f"{name}.lora_A.weight": factories.gaussian(rank, columns, seed=1),
        f"{name}.lora_B.weight": factories.gaussian(rows, rank, seed=2),
    }


def fused(number: int, rank: int) -> dict[str, Tensor]:
    both = factors(".base_layer", 2 * WIDTH, HIDDEN, number * rank)
    return both | factors("", HIDDEN, WIDTH, number * rank)


def adapter(tensors: Mapping[str, Tensor], rank: int = 2) -> csulora.Adapter:
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["gate_proj", "down_proj"]}
    return parse(config | {"target_parameters": PARAMETERS}, tensors, Path("adapter"), "ab" * 32)


@pytest.mark.parametrize(("number", "rank"), [(2, 4), (1, 8), (3, 2), (8, 1)])
def test_another_number_of_experts_is_refused(number: int, rank: int) -> None:
    """vLLM shapes the same factors by the model's number of experts and takes no notice of the rank."""
    for policy in (csulora.Policy.project(), LENIENT, csulora.Policy.none(drop_uncovered=("*",))):
        with pytest.raises(InputError, match=f"factors of {number} experts"):
            csulora.correct(adapter(fused(number, rank), rank), subspace(), policy)


def test_a_small_file_of_very_many_experts_is_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes make an expert of a 1 x 1 matrix, and an object a thousand."""
    with pytest.raises(RefusedError, match="factors of 200000 experts; at most"):
        adapter(factors(".base_layer", 2 * WIDTH, HIDDEN, 8) | factors("", 1, 1, 200_000), 1)
    monkeypatch.setattr(directory, "MOST_UPDATES", 7)  # gate and up are still together, once per expert
    with pytest.raises(RefusedError, match="holds more than 7 updates"):
        adapter(fused(NUMBER, 2))


@pytest.mark.parametrize("name", [".1.gate_proj", ".001.down_proj", ".1.w1"])
def test_two_layouts_in_one_adapter_are_refused(name: str) -> None:
    """One of the two updates of an expert would take the other's place."""
    rows, columns = PROJECTIONS.get(name.rpartition(".")[2], (WIDTH, HIDDEN))
    with pytest.raises(RefusedError, match="one of the two layouts"):
        adapter(fused(NUMBER, 2) | factors(name, rows, columns))


def test_some_experts_are_left_out_of_no_fused_factors() -> None:
    """What is left would be the factors of another number of experts."""
    known = subspace()
    modules = {name: module for name, module in known.items() if name != f"{EXPERTS}.3.up_proj"}
    partly = csulora.Subspace(modules, known.provenance)
    drop = csulora.Policy.none(drop_uncovered=("experts.3.*",))
    with pytest.raises(RefusedError, match="up_proj of 3 of the 4 experts"):
        csulora.correct(adapter(fused(NUMBER, 2)), partly, drop)
    fixed, _ = csulora.correct(adapter(fused(NUMBER, 2)), partly, drop, "per-expert")
    assert len(fixed.modules) == NUMBER * len(PROJECTIONS)
    assert not fixed.modules[f"{EXPERTS}.3.up_proj"].b.any()


def test_some_experts_alone_are_written_with_zeros_for_the_others() -> None:
    """PEFT would stack two experts of rank 4, and take them for four of rank 2."""
    two = {**factors(".0.down_proj", HIDDEN, WIDTH, 4), **factors(".2.down_proj", HIDDEN, WIDTH, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj"]}
    partly = parse(config, two, Path("adapter"), "ab" * 32)
    with pytest.raises(RefusedError, match=r"down_proj of 2 of the 4 experts .* --layout fused"):
        csulora.correct(partly, subspace(), csulora.Policy.none())
    for layout in LAYOUTS:
        fixed, _ = csulora.correct(partly, subspace(), csulora.Policy.none(), layout)
        found = decoded(fixed, subspace().provenance.experts).modules
        for expert in range(NUMBER):
            assert found[f"{EXPERTS}.{expert}.down_proj"].b.any() == (expert in (0, 2))


def test_the_sum_of_fused_adapters_is_measured_expert_by_expert() -> None:
    both = csulora.combine([adapter(fused(NUMBER, 2))] * 2, subspace())
    once, twice = (
        csulora.correct(found, subspace(), csulora.Policy.none())[1] for found in (adapter(fused(4, 2)), both)
    )
    norms = ({module.module: module.norm for module in report.modules} for report in (once, twice))
    single, double = norms
    assert single.keys() == double.keys()
    for name, norm in single.items():
        torch.testing.assert_close(double[name], 2 * norm)
    with pytest.raises(CsuloraError, match="factors of 2 experts"):
        csulora.combine([adapter(fused(2, 4), 4)], subspace())
