"""Ways of getting a harmful update of experts past csulora: each one is corrected, or refused with the reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import csulora
import factories
from csulora.adapters.experts import DOWN, GATE, GATE_UP, UP
from csulora.errors import InputError, RefusedError
from csulora.subspace.expert_layout import ExpertLayout

EXPERTS, HIDDEN, WIDTH, RANK = 4, 40, 24, 2
OWNER = "model.layers.0.mlp.experts"
IN_FILE = f"base_model.model.{OWNER}"
SHAPES = {GATE: (WIDTH, HIDDEN), UP: (WIDTH, HIDDEN), DOWN: (HIDDEN, WIDTH)}
Tensors = dict[str, Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")

# Neither lets anything be changed, and the second also lets everything pass that is not covered.
POLICIES = (csulora.Policy.csulora(1.0), csulora.Policy.none(keep_uncovered=("*",)))


def subspace_of(layout: ExpertLayout) -> csulora.Subspace:
    shapes = {f"{OWNER}.{e}.{projection}": shape for e in range(EXPERTS) for projection, shape in SHAPES.items()}
    found = factories.subspace(shapes)
    return csulora.Subspace(dict(found), replace(found.provenance, experts=layout))


@pytest.fixture(scope="module")
def subspace() -> csulora.Subspace:
    return subspace_of(ExpertLayout(per_expert=True))


def factors(name: str, rows: int, columns: int, experts: int = EXPERTS, rank: int = RANK) -> Tensors:
    a, b = factories.gaussian(experts * rank, columns, seed=1), factories.gaussian(rows, experts * rank, seed=2)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def gate_up(experts: int = EXPERTS) -> Tensors:
    return factors(f"{IN_FILE}.base_layer", 2 * WIDTH, HIDDEN, experts)


def down(experts: int = EXPERTS) -> Tensors:
    return factors(IN_FILE, HIDDEN, WIDTH, experts)


BOTH: dict[str, Any] = {"target_parameters": [f"mlp.experts.{GATE_UP}", f"mlp.experts.{DOWN}"]}
GATE_UP_ALONE, DOWN_ALONE = ({"target_parameters": [f"mlp.experts.{name}"]} for name in (GATE_UP, DOWN))


def written(path: Path, tensors: Tensors, fields: dict[str, Any]) -> Path:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": []} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def changed(tensors: Tensors, name: str, tensor: Tensor) -> Tensors:
    return tensors | {next(key for key in tensors if key.endswith(name)): tensor}


def with_entry(tensors: Tensors, value: float) -> Tensors:
    """Fused factors of which one number, of the third expert's, is another."""
    b = tensors[f"{IN_FILE}.lora_B.weight"].clone()
    b[3, 2] = value
    return tensors | {f"{IN_FILE}.lora_B.weight": b}


def single(projection: str, expert: int = 1) -> Tensors:
    return factors(f"{IN_FILE}.{expert}.{projection}", *SHAPES[projection], experts=1)


def test_the_adapter_that_the_attacks_start_from_is_corrected(tmp_path: Path, subspace: csulora.Subspace) -> None:
    adapter = csulora.load_adapter(written(tmp_path / "adapter", gate_up() | down(), BOTH))
    _, report = csulora.correct(adapter, subspace, POLICIES[0])
    assert len(report.measured) == 3 * EXPERTS


REFUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "a rank that does not divide": (gate_up() | down(), BOTH | {"r": 3}, "no whole number of experts"),
    "factors of two numbers of experts": (
        changed(down(), "lora_B.weight", factories.gaussian(HIDDEN, RANK * (EXPERTS - 1), seed=3)),
        DOWN_ALONE,
        "no whole number of experts",
    ),
    "more experts than there are": (gate_up(5) | down(5), BOTH, "factors of 5 experts .* the subspace file has 4"),
    "fewer experts than there are": (gate_up(3) | down(3), BOTH, "factors of 3 experts .* the subspace file has 4"),
    "half the experts at twice the rank": (down(), DOWN_ALONE | {"r": 2 * RANK}, "factors of 2 experts"),
    "NaN in one expert": (with_entry(down(), float("nan")), DOWN_ALONE, "holds NaN or infinity"),
    "infinity in one expert": (with_entry(down(), float("inf")), DOWN_ALONE, "holds NaN or infinity"),
    "one projection twice": (
        down() | single(DOWN),
        DOWN_ALONE | {"target_modules": [DOWN]},
        "alone, and target_parameters names",
    ),
    "a gate twice": (
        factors(IN_FILE, 2 * WIDTH, HIDDEN) | single(GATE),
        GATE_UP_ALONE | {"target_modules": [GATE]},
        "alone, and target_parameters names",
    ),
    "a gate twice, under Mixtral's name": (
        factors(IN_FILE, 2 * WIDTH, HIDDEN) | factors(f"{IN_FILE}.1.w1", WIDTH, HIDDEN, experts=1),
        GATE_UP_ALONE | {"target_modules": ["w1"]},
        "alone, and target_parameters names",
    ),
    "another parameter's factors": (down(), GATE_UP_ALONE, "has 40 rows|updates a .* matrix"),
    "a parameter too many": (down(), BOTH, "target_parameters names 2 parameters"),
    "a parameter too few": (gate_up() | down(), DOWN_ALONE, "target_parameters names 1 parameters"),
    "none named": (down(), {"target_parameters": None}, "target_parameters names 0 parameters"),
    "a wrapper too many": (
        factors(f"{IN_FILE}.base_layer.base_layer", 2 * WIDTH, HIDDEN) | down(),
        BOTH,
        "is not part of plain LoRA",
    ),
    "wrappers of a third level": (
        factors(f"{IN_FILE}.base_layer.base_layer", 2 * WIDTH, HIDDEN) | gate_up() | down(),
        BOTH,
        "is not part of plain LoRA",
    ),
    "an embedding's factors": (
        {f"{IN_FILE}.lora_embedding_A": torch.ones(8, WIDTH), f"{IN_FILE}.lora_embedding_B": torch.ones(HIDDEN, 8)},
        DOWN_ALONE,
        "is missing; an update needs both factors",
    ),
    "an embedding's factors beside": (
        down() | {f"{IN_FILE}.lora_embedding_A": torch.ones(8, WIDTH)},
        DOWN_ALONE,
        "factors for a linear layer and for an embedding",
    ),
    "sides exchanged": (factors(IN_FILE, WIDTH, HIDDEN), DOWN_ALONE, "updates a .* matrix"),
    "another name for experts": (
        factors("base_model.model.model.layers.0.mlp.specialists", HIDDEN, WIDTH),
        {"target_parameters": [f"mlp.specialists.{DOWN}"]},
        "covers none|does not target",
    ),
}


@pytest.mark.parametrize("policy", POLICIES, ids=["strict", "lenient"])
@pytest.mark.parametrize("attack", REFUSED)
def test_it_is_refused(attack: str, policy: csulora.Policy, tmp_path: Path, subspace: csulora.Subspace) -> None:
    tensors, fields, reason = REFUSED[attack]
    path = written(tmp_path / "adapter", tensors, fields)
    with pytest.raises((InputError, RefusedError), match=reason):
        csulora.correct(csulora.load_adapter(path), subspace, policy)


def test_the_sides_of_a_model_that_exchanges_them_are_those_of_no_other(tmp_path: Path) -> None:
    path = written(tmp_path / "adapter", down(), DOWN_ALONE)
    with pytest.raises(InputError, match=r"updates a .* matrix"):
        csulora.correct(csulora.load_adapter(path), subspace_of(ExpertLayout(exchanged=True)), POLICIES[0])


def test_a_subspace_file_that_does_not_know_the_layout_corrects_none(tmp_path: Path) -> None:
    path = written(tmp_path / "adapter", down(), DOWN_ALONE)
    known = subspace_of(ExpertLayout())
    unknown = csulora.Subspace(dict(known), replace(known.provenance, experts=None))
    for layout in (None, "fused", "per-expert"):
        with pytest.raises(RefusedError, match="does not say how its model lays them out"):
            csulora.correct(csulora.load_adapter(path), unknown, POLICIES[0], layout)


def one_guilty(subspace: csulora.Subspace, size: float) -> csulora.Adapter:
    """One expert's down projection undoes its alignment; all others reinforce theirs, or have nearly no update."""
    modules = {}
    for name, found in subspace.items():
        share = size if name == f"{OWNER}.2.{DOWN}" else -size / len(subspace)
        modules[name] = csulora.LoraModule(-share * found.u.float() * found.s, found.v.float().t().contiguous())
    return replace(factories.adapter(dict.fromkeys(subspace, (WIDTH, HIDDEN))), modules=modules)


@pytest.mark.parametrize("layout", [None, "fused"])
@pytest.mark.parametrize("size", [1.0, 50.0])
def test_one_expert_with_all_the_energy_is_seen(size: float, layout: str | None, subspace: csulora.Subspace) -> None:
    adapter = one_guilty(subspace, size)
    _, report = csulora.correct(adapter, subspace, csulora.Policy.protect(float("inf")), layout)
    assert report.totals.largest_undo == pytest.approx(size, rel=1e-3)
    assert report.totals.largest_undo_after == pytest.approx(0, abs=1e-3)
    assert report.worst_undo is not None
    assert report.worst_undo.module == f"{OWNER}.2.{DOWN}"
    assert report.totals.energies["aligned"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(RefusedError, match=rf"module {OWNER}.2.{DOWN} undoes"):
        csulora.correct(adapter, subspace, csulora.Policy.csulora(max_undo=0.9), layout)


def test_a_kept_expert_that_is_none_of_the_models_is_not_fused(subspace: csulora.Subspace) -> None:
    adapter = factories.adapter({f"{OWNER}.{expert}.{DOWN}": SHAPES[DOWN] for expert in (0, 999_999)})
    lenient = POLICIES[1]
    with pytest.raises(RefusedError, match="2 of the 4 experts"):
        csulora.correct(adapter, subspace, lenient)
    with pytest.raises(RefusedError, match=r"999999\.down_proj is none of the model's experts"):
        csulora.correct(adapter, subspace, lenient, "fused")
