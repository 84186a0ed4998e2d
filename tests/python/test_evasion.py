"""Every way known to us of getting a harmful update past csulora: each one is corrected, or refused with the reason.

An attack that is corrected is compared with the closest safe update of what PEFT would have applied, computed
densely in float64. An attack that is refused is refused under every policy, also under the most lenient.
"""

import json
import math
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import csulora
import factories
import gguf_files
import oracle
import quantised
from csulora.adapters.mlx import directory as mlx
from csulora.adapters.peft.directory import WEIGHTS_FILE
from csulora.adapters.weights_files import CONFIG_FILE
from csulora.correction.model_card import model_card
from csulora.errors import CsuloraError, InputError, RefusedError
from csulora.native import _core
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options
from csulora.subspace.provenance import StoredMatrix
from tolerances import COMPUTED, STORED

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
PREFIX = "base_model.model."
VOCABULARY = factories.gaussian(40, 40, seed=5).bfloat16()  # embedding and head of the aligned checkpoint
RANK = 4
POLICY = csulora.Policy.csulora(3.0, rank="exact")
LENIENT = csulora.Policy.none(keep_uncovered=("*",))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def subspace() -> csulora.Subspace:
    shapes = factories.SHAPES | {"model.embed_tokens": (40, 40)}
    stored = StoredMatrix("BF16", (40, 40), factories.sha256(VOCABULARY))
    vocabulary = {"lm_head": stored, "model.embed_tokens": stored}
    return factories.subspace(shapes, aliases={"lm_head": "model.embed_tokens"}, vocabulary=vocabulary)


def named(module: str, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.lora_A.weight": a.contiguous(), f"{PREFIX}{module}.lora_B.weight": b.contiguous()}


def factors(module: str = Q, seed: int = 0, rank: int = RANK) -> tuple[Tensor, Tensor]:
    rows, columns = factories.SHAPES.get(module, (40, 40))
    return factories.gaussian(rows, rank, seed=seed), factories.gaussian(rank, columns, seed=seed + 1)


def config(**changes: object) -> dict[str, object]:
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets} | changes


def upload(directory: Path, tensors: Mapping[str, Tensor] | bytes, settings: dict[str, object] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps(settings or config()))
    (directory / WEIGHTS_FILE).write_bytes(tensors if isinstance(tensors, bytes) else save(dict(tensors)))
    return directory


def mlx_upload(directory: Path, updates: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {"rank": RANK, "scale": scale, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (directory / CONFIG_FILE).write_text(json.dumps(settings))
    named_factors = {f"{name}.lora_a": a.t().contiguous() for name, (_, a) in updates.items()}
    named_factors |= {f"{name}.lora_b": b.t().contiguous() for name, (b, _) in updates.items()}
    (directory / mlx.WEIGHTS_FILE).write_bytes(save(named_factors))
    return directory


def admitted(path: Path, subspace: csulora.Subspace, policy: csulora.Policy = POLICY) -> dict[str, Tensor]:
    """The updates that come out, dense."""
    fixed, _ = csulora.correct(csulora.load_adapter(path), subspace, policy)
    return {name: oracle.update(module.b, module.a, module.scale) for name, module in fixed.modules.items()}


def safe(update: Tensor, subspace: csulora.Subspace, module: str, policy: csulora.Policy = POLICY) -> Tensor:
    target = subspace[module]
    return oracle.closest_safe_update(update, target.u, target.v, (policy.aligned, policy.partial, policy.off))


TOLERANCE = COMPUTED[torch.float32] + STORED[torch.float32]


def refused_always(path: Path, subspace: csulora.Subspace, reason: str) -> None:
    for policy in (POLICY, LENIENT, csulora.Policy.csulora(drop_uncovered=("*",))):
        with pytest.raises(CsuloraError, match=reason):
            admitted(path, subspace, policy)


# Scales: whatever the configuration says is what PEFT's rules make of it, and the scale is part of the update.

SCALES: dict[str, tuple[dict[str, object], float, float]] = {
    "huge alpha": ({"lora_alpha": 1e30}, 1e30 / RANK, 1e-30),
    "tiny alpha, huge factors": ({"lora_alpha": 1e-30}, 1e-30 / RANK, 1e30),
    "negative alpha": ({"lora_alpha": -8}, -2.0, 1.0),
    "rsLoRA": ({"use_rslora": True}, 2 * RANK / math.sqrt(RANK), 1.0),
    "pattern that matches twice": ({"alpha_pattern": {"self_attn.q_proj": 100, "q_proj": 1}}, 25.0, 1.0),
    "pattern in the other order": ({"alpha_pattern": {"q_proj": 1, "self_attn.q_proj": 100}}, 0.25, 1.0),
    "pattern as an expression": ({"alpha_pattern": {"(k|q)_proj": 1e4}}, 2.5e3, 1.0),
    "pattern beside rsLoRA": ({"use_rslora": True, "alpha_pattern": {"^model.*proj": 7}}, 3.5, 1.0),
    "pattern of another case": ({"alpha_pattern": {"Q_PROJ": 1e4}}, 2.0, 1.0),
}


@pytest.mark.parametrize("name", sorted(SCALES))
def test_scale_is_part_of_the_update(name: str, tmp_path: Path, subspace: csulora.Subspace) -> None:
    settings, scale, size = SCALES[name]
    b, a = factors()
    path = upload(tmp_path / "adapter", named(Q, b * size, a), config(**settings))
    expected = safe(oracle.update(b * size, a, scale), subspace, Q)
    assert oracle.relative_error(admitted(path, subspace)[Q], expected) <= TOLERANCE


@pytest.mark.parametrize(("scale", "size"), [(1e9, 1.0), (-20.0, 1.0), (1e-30, 1e30), (1e30, 1e-30)])
def test_scale_of_an_mlx_adapter_is_part_of_the_update(
    scale: float, size: float, tmp_path: Path, subspace: csulora.Subspace
) -> None:
    b, a = factors()
    path = mlx_upload(tmp_path / "adapter", {Q: (b * size, a)}, scale)
    expected = safe(oracle.update(b * size, a, scale), subspace, Q)
    assert oracle.relative_error(admitted(path, subspace)[Q], expected) <= TOLERANCE


def test_rank_one_with_a_large_alpha_is_corrected(tmp_path: Path, subspace: csulora.Subspace) -> None:
    b, a = factors(rank=1)
    path = upload(tmp_path / "adapter", named(Q, b, a), config(r=1, lora_alpha=1e6))
    assert oracle.relative_error(admitted(path, subspace)[Q], safe(oracle.update(b, a, 1e6), subspace, Q)) <= TOLERANCE


@pytest.mark.parametrize("alpha", [1e300, 1e90, -1e90])
def test_scale_beyond_float32_is_refused(alpha: float, tmp_path: Path, subspace: csulora.Subspace) -> None:
    refused_always(upload(tmp_path / "adapter", named(Q, *factors()), config(lora_alpha=alpha)), subspace, "too large")


# Numbers: factors that are out of proportion.


@pytest.mark.parametrize(
    ("b_size", "a_size", "alpha"),
    [
        (1e-42, 1e35, 8.0),
        (1e35, 1e-42, 8.0),
        (1e-42, 1e-3, 1e38),
        (1e-3, 1e-42, 1e38),
        (1e-42, 1.0, 8e35),
        (1e38, 1e3, 8e-44),
    ],
)
@pytest.mark.parametrize("rank", ["exact", "keep"])
def test_denormal_factors_are_corrected(
    b_size: float,
    a_size: float,
    alpha: float,
    rank: csulora.policy.policy.Rank,
    tmp_path: Path,
    subspace: csulora.Subspace,
) -> None:
    b, a = factors(rank=1)
    b, a = b * b_size, a * a_size
    path = upload(tmp_path / "adapter", named(Q, b, a), config(r=1, lora_alpha=alpha))
    policy = csulora.Policy.project(rank=rank)
    expected = safe(oracle.update(b, a, alpha), subspace, Q, policy)
    assert oracle.relative_error(admitted(path, subspace, policy)[Q], expected) <= TOLERANCE


@pytest.mark.parametrize("aligned", [1.0, 0.75])
@pytest.mark.parametrize("gain", [0.75, 0.5, 0.0])
@pytest.mark.parametrize("lines", ["all", "one"])
def test_rounding_to_the_storage_type_does_not_undo_the_correction(
    aligned: float, gain: float, lines: str, tmp_path: Path, subspace: csulora.Subspace
) -> None:
    """Where entries of B have the single bit of 2^-24, three quarters of one would be rounded back to the whole."""
    b, a = factors()
    chosen = slice(None) if lines == "all" else slice(0, 1)
    b[:, chosen] = b[:, chosen].sign() * 2**-24
    a[chosen] = a[chosen] * 2**14
    path = upload(tmp_path / "adapter", named(Q, b.half(), a.half()), config(lora_alpha=RANK))
    policy = csulora.Policy(overrides=(csulora.Override("*", gains=(aligned, gain, gain, gain)),), rank="exact")
    update = oracle.update(b.half(), a.half())
    components = oracle.split(update, subspace[Q].u, subspace[Q].v)
    expected = oracle.combine(components, {"aligned": aligned, "left": gain, "right": gain, "off": gain})
    assert oracle.relative_error(admitted(path, subspace, policy)[Q], expected) <= STORED[torch.float16]


def denormal_column(dtype: torch.dtype, marks: Tensor) -> tuple[Tensor, Tensor]:
    """B of the smallest numbers that a type holds, which a correction changes by less than half, and a huge A."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return (smallest * marks).to(dtype), (2e3 * factories.gaussian(1, 40, seed=3)).to(dtype)


def cancelling_columns(dtype: torch.dtype, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Two columns that differ by the last bit alone, with opposite rows: a correction is far below that bit."""
    b = torch.cat([1 + torch.finfo(dtype).eps * marks, torch.ones_like(marks)], 1)
    a = factories.gaussian(1, 40, seed=3).to(dtype)
    return b.to(dtype), torch.cat([a, -a])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hide", [denormal_column, cancelling_columns])
@pytest.mark.parametrize("rule", [_core.RankRule.keep, _core.RankRule.fixed])
@pytest.mark.parametrize(
    "input_filter", [None, _core.InputFilter(torch.eye(40), torch.eye(40))], ids=["everywhere", "filtered"]
)
def test_rounding_does_not_undo_what_is_taken_away_along_directions(
    dtype: torch.dtype,
    hide: Callable[[torch.dtype, Tensor], tuple[Tensor, Tensor]],
    rule: _core.RankRule,
    input_filter: _core.InputFilter | None,
    subspace: csulora.Subspace,
) -> None:
    u, s, v = subspace[Q].u, subspace[Q].s, subspace[Q].v
    b, a = hide(dtype, torch.where(u[:, :1].abs() > 0.1, u[:, :1].sign(), 0))
    directions = _core.Directions([0.0] * 6, [])
    task = _core.CorrectionTask(_core.LoraFactors(b, a), _core.Subspace(u, s, v), directions, input_filter=input_filter)
    factors = _core.correct([task], _core.CorrectionOptions(rule, rank=1))[0].factors
    update = oracle.update(b, a)
    expected = update - u.double() @ (u.double().t() @ update)
    assert oracle.relative_error(oracle.update(factors.b, factors.a), expected) <= TOLERANCE + STORED[dtype]


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_an_outlier_does_not_hide_the_rest(size: float, tmp_path: Path, subspace: csulora.Subspace) -> None:
    """Of two directions of an update, one holds a huge entry; the other one is still projected as it should be."""
    b, a = factors(rank=2)
    b[:, 0] = 0
    b[0, 0] = size
    a[0] = factories.gaussian(40, seed=9) / 8
    path = upload(tmp_path / "adapter", named(Q, b, a), config(r=2))
    policy = csulora.Policy(aligned=math.inf, partial=math.inf, off=0.0, rank="exact")
    x = admitted(path, subspace, policy)[Q]
    alone = a[1].double() - (a[1].double() @ a[0].double()) / a[0].double().square().sum() * a[0].double()
    expected = safe(oracle.update(b, a, 4.0), subspace, Q, policy)
    assert oracle.relative_error(x, expected) <= TOLERANCE
    # Seen by inputs that the outlier's direction does not react to.
    assert oracle.relative_error(x @ alone, expected @ alone) <= size * TOLERANCE


def test_energy_parked_in_one_module_does_not_dilute_the_others(tmp_path: Path, subspace: csulora.Subspace) -> None:
    tensors = named(Q, *factors(Q))
    b, a = factors(DOWN, seed=5)
    alone = admitted(upload(tmp_path / "alone", tensors), subspace)
    beside = admitted(upload(tmp_path / "beside", tensors | named(DOWN, b * 1e6, a)), subspace)
    assert torch.equal(beside[Q], alone[Q])


def test_energy_parked_inside_the_subspace_dilutes_no_gain_that_is_zero(
    tmp_path: Path, subspace: csulora.Subspace
) -> None:
    """Relative energies can be diluted within a module; an infinite penalty does not depend on them."""
    target = subspace[Q]
    b, a = factors()
    parked = torch.cat([b, 1e3 * target.u[:, :1]], 1), torch.cat([a, target.v[:, :1].t()], 0)
    path = upload(tmp_path / "adapter", named(Q, *parked), config(r=RANK + 1, lora_alpha=RANK + 1))
    _, report = csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora(3.0))
    assert report.measured[0].energies is not None
    assert report.measured[0].energies["aligned"] > 0.99  # what an operator sees of it
    x = admitted(path, subspace, csulora.Policy.project())[Q]
    outside = x - target.u.double() @ (target.u.double().t() @ x)
    assert float(outside.norm()) <= TOLERANCE * float(x.norm())


def test_energy_parked_anywhere_leaves_two_fifths_of_a_tuned_penalty(
    tmp_path: Path, subspace: csulora.Subspace
) -> None:
    directions = csulora.policy.overrides.Directions((0.0, 0.5), (1.0, 0.5))
    follows = csulora.Policy.none(
        rank="exact", overrides=(csulora.policy.policy.Override("*", directions=directions),), reference_energy=0.3
    )
    tensors, (b, a) = named(Q, *factors(Q)), factors(DOWN, seed=5)
    parked = admitted(upload(tmp_path / "parked", tensors | named(DOWN, b * 1e6, a)), subspace, follows)
    least = 0.5 / (0.5 + 0.5 * 0.4)
    weakest = csulora.policy.overrides.Directions((0.0, least), (1.0, least))
    fixed = csulora.Policy.none(rank="exact", overrides=(csulora.policy.policy.Override("*", directions=weakest),))
    expected = admitted(upload(tmp_path / "alone", tensors), subspace, fixed)[Q]
    assert oracle.relative_error(parked[Q], expected) <= TOLERANCE


# Undo: the aligned component is blind to sign.


def removal(subspace: csulora.Subspace, share: float = 1.0) -> tuple[Tensor, Tensor]:
    target = subspace[Q]
    return -share * target.u * target.s, target.v.t()


def test_removal_of_the_alignment_is_measured_and_refused_or_removed(
    tmp_path: Path, subspace: csulora.Subspace
) -> None:
    b, a = removal(subspace)
    path = upload(tmp_path / "adapter", named(Q, b, a), config(r=6, lora_alpha=6))
    adapter = csulora.load_adapter(path)
    _, report = csulora.correct(adapter, subspace, csulora.Policy.csulora())
    assert report.measured[0].undo == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(RefusedError, match=r"undoes 1\.000 of its alignment"):
        csulora.correct(adapter, subspace, csulora.Policy.csulora(max_undo=0.9))
    x = admitted(path, subspace, csulora.Policy.protect(math.inf))[Q]
    assert float(x.norm()) <= TOLERANCE * float(oracle.update(b, a).norm())


def test_undo_of_one_module_is_not_averaged_away(tmp_path: Path, subspace: csulora.Subspace) -> None:
    reinforcing = subspace[DOWN].u * subspace[DOWN].s * 100, subspace[DOWN].v.t()
    path = upload(tmp_path / "a", named(Q, *removal(subspace)) | named(DOWN, *reinforcing), config(r=6, lora_alpha=6))
    with pytest.raises(RefusedError, match=rf"module {Q} undoes 1.000"):
        csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora(max_undo=0.5))


def test_removal_split_over_two_adapters_is_measured_on_their_sum(tmp_path: Path, subspace: csulora.Subspace) -> None:
    halves = [
        csulora.load_adapter(upload(tmp_path / name, named(Q, *removal(subspace, 0.5)), config(r=6, lora_alpha=6)))
        for name in ("one", "two")
    ]
    policy = csulora.Policy.none(max_undo=0.6)
    csulora.correct(halves[0], subspace, policy)
    with pytest.raises(RefusedError, match=r"undoes 1\.000"):
        csulora.correct(csulora.combine(halves, subspace), subspace, policy)


# Hiding places: tensors that are not the factors of a covered module.

WEIGHT = torch.ones(40, 40)


def flipped(matrix: Tensor) -> Tensor:
    copy = matrix.clone()
    copy.view(torch.int16)[7, 11] ^= 1
    return copy


HIDDEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "norm": ({f"{PREFIX}model.norm.weight": torch.ones(40)}, "not part of plain LoRA"),
    "factors of a norm": (named("model.norm", torch.ones(40, RANK), torch.ones(RANK, 1)), "does not target"),
    "bias": ({f"{PREFIX}{Q}.bias": torch.ones(40)}, "biases of the base model"),
    "bias of a factor": ({f"{PREFIX}{Q}.lora_B.bias": torch.ones(40)}, "factors have biases"),
    "DoRA magnitude": ({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(40)}, "DoRA"),
    "DoRA magnitude, as PEFT calls it": ({f"{PREFIX}{Q}.lora_magnitude_vector.weight": torch.ones(40)}, "DoRA"),
    "modules_to_save": ({f"{PREFIX}lm_head.modules_to_save.weight": WEIGHT}, "whole modules"),
    "layer saved whole": ({f"{PREFIX}{Q}.weight": WEIGHT}, "not part of plain LoRA"),
    "layer under its base layer": ({f"{PREFIX}{Q}.base_layer.weight": WEIGHT}, "weight of the base model"),
    "embedding saved whole": ({f"{PREFIX}model.embed_tokens.weight": WEIGHT}, "differs from the aligned"),
    "embedding under its base layer": ({f"{PREFIX}model.embed_tokens.base_layer.weight": WEIGHT}, "differs from the"),
    "embedding with one bit flipped": (
        {f"{PREFIX}model.embed_tokens.base_layer.weight": flipped(VOCABULARY)},
        "differs from the aligned",
    ),
    "embedding in a wider type, moved less than it rounds": (
        {f"{PREFIX}model.embed_tokens.base_layer.weight": VOCABULARY.float() * (1 + 2**-12)},
        "differs from the aligned",
    ),
    "embedding under both": (
        {f"{PREFIX}lm_head{middle}.weight": VOCABULARY.clone() for middle in ("", ".base_layer")},
        "of the base model twice",
    ),
    "head saved whole": ({f"{PREFIX}lm_head.weight": WEIGHT}, "differs from the aligned"),
    "another vocabulary's head": ({f"{PREFIX}score.lm_head.base_layer.weight": VOCABULARY}, "no hash to compare"),
    "trainable tokens": ({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": WEIGHT}, "rows of an"),
    "another adapter in the file": ({f"{PREFIX}{Q}.lora_A.evil.weight": WEIGHT}, "the adapter's name"),
    "another adapter named default": ({f"{PREFIX}{Q}.lora_A.default.weight": WEIGHT}, "the adapter's name"),
    "factor in another case": ({f"{PREFIX}{Q}.LORA_A.weight": WEIGHT}, "csulora knows no such tensor"),
    "prefix in another case": ({f"Base_Model.model.{Q}.lora_A.weight": WEIGHT}, "does not start with"),
    "no prefix": ({f"{Q}.lora_A.weight": WEIGHT}, "does not start with"),
    "half a prefix": ({f"base_model.{Q}.lora_A.weight": WEIGHT}, "not part of plain LoRA|lora_B.weight is missing"),
    "prefix twice": ({f"{PREFIX}{PREFIX}{Q}.lora_A.weight": WEIGHT}, "does not start with"),
    "space behind the name": ({f"{PREFIX}{Q}.lora_A.weight ": WEIGHT}, "not part of plain LoRA"),
    "NUL in the name": ({f"{PREFIX}{Q}\0.lora_A.weight": WEIGHT}, "not part of plain LoRA"),
    "line break in the name": ({f"{PREFIX}{Q}\n.lora_A.weight": WEIGHT}, "not part of plain LoRA"),
    "letter that looks alike": ({f"{PREFIX}{Q.replace('o', chr(0x43E))}.lora_A.weight": WEIGHT}, "not part of plain"),
    "path instead of a name": ({f"{PREFIX}../../{Q}.lora_A.weight": WEIGHT}, "not part of plain LoRA"),
    "module in another case": (named(Q.upper(), *factors()), "does not target"),
    "embedding's factors for a linear layer": (
        {
            f"{PREFIX}{Q}.lora_embedding_A": WEIGHT[:RANK],
            f"{PREFIX}{Q}.lora_embedding_B": WEIGHT[:, :RANK].contiguous(),
        },
        "a linear layer and for an embedding",
    ),
}


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_tensors_beside_the_factors_are_refused_under_every_policy(
    name: str, tmp_path: Path, subspace: csulora.Subspace
) -> None:
    extra, reason = HIDDEN[name]
    refused_always(upload(tmp_path / "adapter", named(Q, *factors()) | extra), subspace, reason)


@pytest.mark.parametrize("module", [Q, "lm_head"])
def test_factors_that_hosts_transpose_or_drop_are_refused(
    module: str, tmp_path: Path, subspace: csulora.Subspace
) -> None:
    b, a = (factor.contiguous() for factor in factors())
    embedding = {f"{PREFIX}{module}.lora_embedding_A": a, f"{PREFIX}{module}.lora_embedding_B": b}
    refused_always(upload(tmp_path / "embedding", embedding), subspace, "which is no embedding")


def test_a_parameter_that_is_stored_transposed_is_refused(tmp_path: Path) -> None:
    """PEFT adds B A to GPT-2's matrix as it is stored, (in, out); a square one does not show it."""
    module = "transformer.h.0.attn.c_proj"
    settings = config(target_modules=[], target_parameters=["attn.c_proj.weight"])
    path = upload(tmp_path / "adapter", named(module, *factors()), settings)
    refused_always(path, factories.subspace({module: (40, 40)}), "name the module in target_modules")


def test_uncovered_modules_pass_only_where_the_policy_says_so(tmp_path: Path, subspace: csulora.Subspace) -> None:
    extra = named("model.layers.7.self_attn.q_proj", *factors())
    path = upload(tmp_path / "adapter", named(Q, *factors()) | extra)
    with pytest.raises(RefusedError, match=r"covers other layers, but not module model.layers.7"):
        admitted(path, subspace)
    assert set(admitted(path, subspace, csulora.Policy.csulora(drop_uncovered=("*",)))) == {Q}
    _, report = csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora(keep_uncovered=("*",)))
    assert {module.module: module.status for module in report.modules}["model.layers.7.self_attn.q_proj"] == "kept"


# Names: one weight has many spellings, and none of them hides a second update.


@pytest.mark.parametrize("second", ["layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"])
def test_a_wrapper_that_hides_a_second_update_is_refused(
    second: str, tmp_path: Path, subspace: csulora.Subspace
) -> None:
    both = named(Q, *factors()) | named(second, *factors(seed=3))
    refused_always(upload(tmp_path / "adapter", both), subspace, f"both update {Q}")


def test_a_name_in_memory_hides_no_second_update(tmp_path: Path) -> None:
    router, in_memory = "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"
    subspace = factories.subspace({router: (40, 40)}, names={in_memory: router})
    settings = config(target_modules=["gate"])
    for name in (router, in_memory):
        path = upload(tmp_path / name, named(name, *factors()), settings)
        expected = safe(oracle.update(*factors(), 2.0), subspace, router)
        assert oracle.relative_error(admitted(path, subspace)[name], expected) <= TOLERANCE
    both = named(router, *factors()) | named(in_memory, *factors(seed=3))
    refused_always(upload(tmp_path / "both", both, settings), subspace, f"both update {router}")


def test_a_name_that_two_weights_may_have_is_refused_with_both(tmp_path: Path) -> None:
    one, other = "model.layers.0.self_attn.q_proj", "backbone.layers.0.self_attn.q_proj"
    subspace = factories.subspace({one: (40, 40), other: (40, 40)})
    path = upload(tmp_path / "adapter", named("layers.0.self_attn.q_proj", *factors()))
    refused_always(path, subspace, f"may be {other} or {one}")


def test_a_further_name_never_takes_the_place_of_a_weight(tmp_path: Path) -> None:
    """Whoever writes a subspace file cannot point a module's own name at another module."""
    subspace = factories.subspace(names={Q: DOWN, f"backbone.{Q}": DOWN}, aliases={Q: DOWN})
    path = upload(tmp_path / "adapter", named(Q, *factors()))
    expected = safe(oracle.update(*factors(), 2.0), subspace, Q)
    assert oracle.relative_error(admitted(path, subspace)[Q], expected) <= TOLERANCE


def test_a_tower_hides_no_update_of_the_language_model(tmp_path: Path, subspace: csulora.Subspace) -> None:
    path = upload(tmp_path / "adapter", named(f"vision_tower.{Q}", *factors()) | named(DOWN, *factors(DOWN)))
    with pytest.raises(RefusedError, match=f"does not cover module vision_tower.{Q}"):
        admitted(path, subspace)


def test_tied_weights_are_corrected_under_either_name(tmp_path: Path, subspace: csulora.Subspace) -> None:
    b, a = factors("lm_head")
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": b.t().contiguous(),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": a.t().contiguous(),
    }
    x = admitted(upload(tmp_path / "adapter", named("lm_head", b, a) | embedding), subspace)
    expected = safe(oracle.update(b, a, 2.0), subspace, "model.embed_tokens")
    for name in ("lm_head", "model.embed_tokens"):
        assert oracle.relative_error(x[name], expected) <= TOLERANCE


@pytest.mark.parametrize("spelling", ["layers.0.self_attn.q_proj", "transformer.model.layers.0.self_attn.q_proj"])
def test_a_module_under_two_names_is_refused(spelling: str, tmp_path: Path, subspace: csulora.Subspace) -> None:
    """Each half would be corrected by its own energies, and hosts disagree on which half they apply."""
    path = upload(tmp_path / "adapter", named(Q, *factors()) | named(spelling, *factors(seed=7)))
    with pytest.raises(RefusedError, match="both update"):
        admitted(path, subspace)


# The container: two readers must not see two different things in one file.


def container(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(name: str, shape: list[int], start: int, stop: int, dtype: str = "F32") -> str:
    return f'"{name}":' + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, stop]})


A_NAME, B_NAME = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
BYTES = 4 * RANK * 40
GOOD_A, GOOD_B = entry(A_NAME, [RANK, 40], 0, BYTES), entry(B_NAME, [40, RANK], BYTES, 2 * BYTES)
CONTAINERS: dict[str, bytes] = {
    "name twice": container(
        f"{{{GOOD_A},{GOOD_B},{entry(A_NAME, [RANK, 40], 2 * BYTES, 3 * BYTES)}}}", bytes(3 * BYTES)
    ),
    "two tensors in the same bytes": container(f"{{{GOOD_A},{entry(B_NAME, [40, RANK], 0, BYTES)}}}", bytes(BYTES)),
    "overlap": container(f"{{{GOOD_A},{entry(B_NAME, [40, RANK], 8, 8 + BYTES)}}}", bytes(BYTES + 8)),
    "gap": container(f"{{{GOOD_A},{entry(B_NAME, [40, RANK], BYTES + 8, 2 * BYTES + 8)}}}", bytes(2 * BYTES + 8)),
    "bytes behind the last tensor": container(f"{{{GOOD_A},{GOOD_B}}}", bytes(2 * BYTES + 1)),
    "too few bytes": container(f"{{{GOOD_A},{GOOD_B}}}", bytes(2 * BYTES - 1)),
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header of 2^64-1 bytes": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "shape whose product overflows": container(f"{{{entry(A_NAME, [1 << 62, 4], 0, 0)},{GOOD_B}}}", bytes(2 * BYTES)),
    "shape beyond the file": container(f"{{{entry(A_NAME, [1 << 40, 40], 0, 160 << 40)}}}", bytes(BYTES)),
    "negative shape": container(f"{{{entry(A_NAME, [-RANK, -40], 0, BYTES)},{GOOD_B}}}", bytes(2 * BYTES)),
    "type unknown": container(f"{{{entry(A_NAME, [RANK, 40], 0, BYTES, 'F33')},{GOOD_B}}}", bytes(2 * BYTES)),
    "type of half a byte": container(f"{{{entry(A_NAME, [RANK, 40], 0, BYTES // 8, 'F4')}}}", bytes(BYTES // 8)),
    "deep header": container('{"a":' + "[" * 100_000, b""),
    "header no text": container(b"{\xff\xfe}", b""),
}


@pytest.mark.parametrize("name", sorted(CONTAINERS))
def test_ambiguous_containers_are_refused(name: str, tmp_path: Path, subspace: csulora.Subspace) -> None:
    refused_always(upload(tmp_path / "adapter", CONTAINERS[name]), subspace, WEIGHTS_FILE)


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type":"LORA","r":4,"r":1,"lora_alpha":8,"target_modules":["q_proj"]}',
        '{"peft_type":"LORA","r":4,"lora_alpha":8,"lora_alpha":1e9,"target_modules":["q_proj"]}',
        '{"peft_type":"LORA","r":4,"lora_alpha":NaN,"target_modules":["q_proj"]}',
        '{"peft_type":"LORA","r":4,"lora_alpha":1e999,"target_modules":["q_proj"]}',
        '{"peft_type":"LORA","r":4.0,"lora_alpha":8,"target_modules":["q_proj"]}',
        '{"peft_type":"LORA","r":true,"lora_alpha":8,"target_modules":["q_proj"]}',
        '{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"alpha_pattern":' + "[" * 50_000,
        '{"peft_type":"LORA","r":' + "4" * 5_000 + ',"lora_alpha":8,"target_modules":["q_proj"]}',
    ],
)
def test_ambiguous_configurations_are_refused(text: str, tmp_path: Path, subspace: csulora.Subspace) -> None:
    path = upload(tmp_path / "adapter", named(Q, *factors()))
    (path / CONFIG_FILE).write_text(text)
    refused_always(path, subspace, CONFIG_FILE)


# Claims: what an adapter says about itself counts for nothing.


def test_an_adapter_that_claims_to_be_corrected_is_corrected(tmp_path: Path, subspace: csulora.Subspace) -> None:
    honest = csulora.correct(csulora.load_adapter(upload(tmp_path / "honest", named(Q, *factors()))), subspace, POLICY)[
        0
    ]
    csulora.save_adapter(honest, tmp_path / "claim")
    b, a = factors(seed=50)
    (tmp_path / "claim" / WEIGHTS_FILE).write_bytes(save(named(Q, b, a)))
    (tmp_path / "claim" / CONFIG_FILE).write_text(json.dumps(config()))
    x = admitted(tmp_path / "claim", subspace)
    assert oracle.relative_error(x[Q], safe(oracle.update(b, a, 2.0), subspace, Q)) <= TOLERANCE


def test_subspaces_for_look_alike_models_are_told_apart(tmp_path: Path, subspace: csulora.Subspace) -> None:
    look_alike = factories.subspace(factories.SHAPES, seed=77)
    look_alike.save(tmp_path / "subspace.safetensors")
    with pytest.raises(RefusedError, match="tuned for the subspace file"):
        admitted(
            upload(tmp_path / "a", named(Q, *factors())), look_alike, csulora.Policy(subspace_sha256=subspace.sha256)
        )
    other_shapes = factories.subspace({Q: (48, 40)})
    with pytest.raises(InputError, match="a model of another size"):
        admitted(upload(tmp_path / "b", named(Q, *factors())), other_shapes)


# Files: what is hashed is what is used, and nothing is waited for or taken in without bounds.


def test_the_bytes_hashed_are_the_bytes_used(tmp_path: Path, subspace: csulora.Subspace) -> None:
    """A directory that is exchanged all the time yields one adapter or the other, never one under the other's hash."""
    both = [upload(tmp_path / name, named(Q, *factors(seed=seed))) for name, seed in (("one", 0), ("two", 50))]
    expected = {adapter.sha256: adapter for adapter in map(csulora.load_adapter, both)}
    link = tmp_path / "current"
    link.symlink_to(both[0])
    seen = set()
    for round_ in range(60):
        stop = exchanging(link, both)
        found = csulora.load_adapter(link)
        stop()
        seen.add(found.sha256)
        assert torch.equal(found.modules[Q].b, expected[found.sha256].modules[Q].b), round_
    assert seen <= set(expected)


def exchanging(link: Path, targets: list[Path]) -> Callable[[], None]:
    """Let a link change its target until the function that is returned is called."""
    finished = threading.Event()

    def exchange() -> None:
        for count in range(1_000_000):
            if finished.is_set():
                return
            new = link.with_name("new")
            new.symlink_to(targets[count % 2])
            new.rename(link)

    thread = threading.Thread(target=exchange)
    thread.start()

    def stop() -> None:
        finished.set()
        thread.join()

    return stop


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "socket"])
def test_what_is_no_regular_file_is_never_waited_for(
    file: str, kind: str, tmp_path: Path, subspace: csulora.Subspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = upload(tmp_path / "adapter", named(Q, *factors()))
    (path / file).unlink()
    if kind == "fifo":
        os.mkfifo(path / file)
    elif kind == "device":
        (path / file).symlink_to("/dev/zero")
    elif kind == "directory":
        (path / file).mkdir()
    else:
        monkeypatch.chdir(path)  # a socket's address holds at most 107 bytes, fewer than many a path
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(file)
    refused_always(path, subspace, file)


def test_a_sparse_file_beyond_the_limit_is_not_read(tmp_path: Path, subspace: csulora.Subspace) -> None:
    path = upload(tmp_path / "adapter", named(Q, *factors()))
    os.truncate(path / WEIGHTS_FILE, 1 << 40)
    refused_always(path, subspace, "at most")


def test_a_sparse_file_of_zeros_behind_a_header_is_refused_before_it_is_read(
    tmp_path: Path, subspace: csulora.Subspace
) -> None:
    path = upload(tmp_path / "adapter", named(Q, *factors()))
    os.truncate(path / WEIGHTS_FILE, 12 << 30)
    start = peak_memory()
    refused_always(path, subspace, "not a readable safetensors file")
    assert peak_memory() - start < 64 << 20


def test_a_file_of_very_many_tensors_is_refused_before_they_are_made(
    tmp_path: Path, subspace: csulora.Subspace
) -> None:
    count = 262_145
    entries = (entry(f"{PREFIX}m{i}.lora_A.weight", [1, 1], 4 * i, 4 * i + 4) for i in range(count))
    path = upload(tmp_path / "adapter", container("{" + ",".join(entries) + "}", bytes(4 * count)))
    with pytest.raises(RefusedError, match="at most 262144 are read"):
        admitted(path, subspace, LENIENT)


def test_very_many_patterns_and_names_are_not_multiplied(tmp_path: Path, subspace: csulora.Subspace) -> None:
    names_ = [f"a{i}.q_proj" for i in range(100_000)]
    settings = config(rank_pattern=dict.fromkeys(names_, RANK), target_modules=names_, exclude_modules=names_)
    refused_always(upload(tmp_path / "adapter", named(Q, *factors()), settings), subspace, "does not target")


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Ranks: far above the matrix they say nothing more, and time and memory must not follow their cube.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", [POLICY, csulora.Policy.none(), csulora.Policy.project()])
def test_a_rank_far_above_the_matrix_is_reduced_first(
    policy: csulora.Policy, dtype: torch.dtype, tmp_path: Path, subspace: csulora.Subspace
) -> None:
    b, a = factors(rank=20_000)
    b, a = (b * 1e-2).to(dtype), a.to(dtype)
    path = upload(tmp_path / "adapter", named(Q, b, a), config(r=20_000, lora_alpha=20_000))
    fixed, report = csulora.correct(csulora.load_adapter(path), subspace, policy)
    assert fixed.modules[Q].rank == report.modules[0].rank_after == 40
    assert report.modules[0].rank == 20_000
    found = oracle.update(fixed.modules[Q].b, fixed.modules[Q].a)
    assert oracle.relative_error(found, safe(oracle.update(b, a), subspace, Q, policy)) <= TOLERANCE + STORED[dtype]


def test_a_rank_that_takes_minutes_is_refused_with_what_to_do(
    tmp_path: Path, subspace: csulora.Subspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = factories.adapter({Q: (40, 40)}, rank=17)
    assert csulora.correct(adapter, subspace, POLICY)
    monkeypatch.setattr("csulora.correction.correct.LARGEST_RANK", 16)
    with pytest.raises(RefusedError, match=r"rank 17; ranks up to 16 .*--policy none --rank 16"):
        csulora.correct(adapter, subspace, POLICY)
    smaller, report = csulora.correct(adapter, subspace, csulora.Policy.none(rank=16))
    assert report.modules[0].rank_after == 16
    csulora.correct(smaller, subspace, POLICY)


# Patterns: the time they may take is the file's, not a pattern's.


def test_slow_patterns_have_a_few_seconds_together(
    tmp_path: Path, subspace: csulora.Subspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csulora.adapters.peft.patterns._SECONDS", 1.0)
    slow = "(.*a)*.*_proj|" * 8 + "q_proj"
    fields = {"target_modules": slow, "exclude_modules": slow + "x", "alpha_pattern": {slow: 1}}
    path = upload(tmp_path / "adapter", named(Q, *factors()), config(**fields, rank_pattern={slow: RANK}))
    start = time.monotonic()
    with suppress(RefusedError):
        csulora.load_adapter(path)
    assert time.monotonic() - start < 10  # four patterns and two of each written: 20 before


def test_a_pattern_hands_back_nothing_of_its_own(tmp_path: Path) -> None:
    """A group that is called like csulora's own held every name once for each pattern."""
    names_ = [f"{'a' * 380}{count:05}" for count in range(300)]
    tensors = {k: v for name in names_ for k, v in named(name, torch.zeros(1, 1), torch.zeros(1, 1)).items()}
    patterns_ = {f"(?P<idx>.*){'()' * count}": 1 for count in range(90)}
    path = upload(tmp_path / "adapter", tensors, config(r=1, target_modules=".*", alpha_pattern=patterns_))
    start = peak_memory()
    assert len(csulora.load_adapter(path).modules) == 300
    assert peak_memory() - start < 16 << 20


# Documents: what is small in a file stays small in what is written and said.


def test_nesting_is_not_blown_up_by_indentation(tmp_path: Path, subspace: csulora.Subspace) -> None:
    deep: object = {}
    for _ in range(28):
        deep = {"x": deep, "y": [[[1]]]}
    path = upload(tmp_path / "adapter", named(Q, *factors()), config(auto_mapping=deep, eva_config=deep))
    fixed, _ = csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora())
    csulora.save_adapter(fixed, tmp_path / "fixed")
    assert (tmp_path / "fixed" / CONFIG_FILE).stat().st_size < 1000


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize("field", ["lora_dropout", "auto_mapping", "lora_alpha", "peft_version"])
def test_numbers_beyond_json_are_refused(number: str, field: str, tmp_path: Path, subspace: csulora.Subspace) -> None:
    path = upload(tmp_path / "adapter", named(Q, *factors()))
    text = json.dumps(config() | {field: "NUMBER"}).replace('"NUMBER"', number)
    (path / CONFIG_FILE).write_text(text)
    refused_always(path, subspace, f"{field} is {number}; write a finite number")


@pytest.mark.parametrize("name", ["adapter\n# Approved", "a`b<script>", "\x1b[2J", "x" * 250, "](http://a)"])
def test_the_card_shows_a_directory_name_as_text(name: str, tmp_path: Path, subspace: csulora.Subspace) -> None:
    path = upload(tmp_path / name, named(Q, *factors()))
    card = csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora())[0].documents["README.md"]
    (heading,) = [line for line in card.splitlines() if line.startswith("# ")]
    assert heading.isprintable()
    assert heading.startswith("# `")
    assert heading.count("`") == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.q_proj",
        "model.language_model.model.layers.0.self_attn.q_proj",
        "model.layers.0.model.self_attn.q_proj",
    ],
)
def test_another_spelling_of_a_covered_module_is_corrected_as_that(
    name: str, tmp_path: Path, subspace: csulora.Subspace
) -> None:
    """Hosts map old and nested names of multimodal models to the module that the subspace file covers."""
    b, a = factors()
    path = upload(tmp_path / "adapter", named(name, b, a), config(target_modules=["q_proj"]))
    x = admitted(path, subspace, LENIENT)
    assert oracle.relative_error(x[name], safe(oracle.update(b, a, 2.0), subspace, Q, LENIENT)) <= TOLERANCE


def test_a_prefix_within_a_name_is_refused(tmp_path: Path, subspace: csulora.Subspace) -> None:
    name = "model.layers.0.base_model.model.self_attn.q_proj"
    path = upload(tmp_path / "adapter", named(name, *factors()), config(target_modules=["q_proj"]))
    refused_always(path, subspace, "not part of plain LoRA")


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("kind", ["blocks", "one scale", "channels"])
def test_scales_that_would_hide_a_displacement_are_refused(kind: str, scale: float, tmp_path: Path) -> None:
    """A NaN spreads over a block of an FP8 weight, a zero empties it: neither may make a subspace file."""
    weights = factories.llama_weights(layers=1)
    tensors, _ = quantised.quantise(factories.moved(weights), quantised.KINDS[kind])
    name = next(name for name in tensors if name.startswith(f"{Q}.weight_scale"))
    tensors[name].view(-1)[-1] = scale
    config = {"quantization_config": quantised.KINDS[kind].settings}
    base = factories.save_checkpoint(tmp_path / "base", weights)
    aligned = factories.save_checkpoint(tmp_path / "aligned", tensors, config)
    with pytest.raises(InputError, match=rf"model\.safetensors: {name} holds a scale that is not a positive number"):
        csulora.extract(base, aligned, output=tmp_path / "subspace")
    assert not (tmp_path / "subspace").exists()


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_a_file_that_is_truncated_meanwhile_is_an_error_and_no_signal(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that maps a file dies of it."""
    path = upload(tmp_path / "adapter", named(Q, *factors()))
    file = path / WEIGHTS_FILE
    if kind == "gguf":
        model = gguf_files.save_model(tmp_path / "model.gguf", factories.llama_weights())
        shapes = {"model.layers.0.mlp.down_proj": (48, 64)}
        loaded = csulora.load_adapter(factories.save_adapter(tmp_path / "peft", shapes))
        path = file = tmp_path / "adapter.gguf"
        csulora.save_adapter(loaded, file, "gguf", base_model=model)
    opened = os.fstat

    def truncate(descriptor: int) -> os.stat_result:
        found = opened(descriptor)
        if found.st_ino == file.stat().st_ino:
            os.truncate(file, found.st_size - 3)
        return found

    monkeypatch.setattr("os.fstat", truncate)
    with pytest.raises(InputError):
        csulora.load_adapter(path)


def test_what_passes_uncorrected_is_said_first(tmp_path: Path, subspace: csulora.Subspace) -> None:
    """A policy that keeps what the subspace file does not cover can let a whole model through."""
    elsewhere = "vision_tower.layers.0.self_attn.q_proj"
    b, a = factors()
    tensors = named(Q, b, a) | named(elsewhere, 10 * b, a.clone())
    path = upload(tmp_path / "adapter", tensors, config(target_modules=["q_proj"]))
    gate = Gate.open(subspace, csulora.Policy.csulora(keep_uncovered=("*",)), tmp_path / "log.jsonl")
    with gate.decision(path) as decision:
        _, report = decision.correct(decision.read(path))
    share = 100 / 101
    assert report.totals.uncorrected == pytest.approx(share)
    assert report.warning.startswith("99.0% of |dW|^2 passes uncorrected, in 1 of 2 modules")
    logged = json.loads((tmp_path / "log.jsonl").read_text())["totals"]
    assert next(iter(logged)) == "uncorrected"
    assert logged["uncorrected"] == pytest.approx(share)
    assert "99.0% of |dW|^2 passes uncorrected" in model_card(report, None)


# The directory guard: what is uploaded is looked at as an enemy would arrange it.


@pytest.fixture
def guard(tmp_path: Path, subspace: csulora.Subspace) -> DirectoryGuard:
    (tmp_path / "in").mkdir()
    return DirectoryGuard(
        tmp_path / "in", tmp_path / "out", Gate.open(subspace, POLICY), Options(0.0, 0.0), say=lambda _: None
    )


def outcome(guard: DirectoryGuard) -> set[str]:
    assert guard.scan()
    return {path.name for path in guard.outgoing.iterdir()}


def test_guard_ignores_claims_and_records_of_its_own_in_uploads(
    guard: DirectoryGuard, subspace: csulora.Subspace
) -> None:
    b, a = factors()
    path = upload(guard.incoming / "a", named(Q, b, a))
    outcome(guard)
    for file in (guard.outgoing / "a").iterdir():
        if not (path / file.name).exists():
            (path / file.name).write_bytes(file.read_bytes())
    b2, a2 = factors(seed=60)
    (path / WEIGHTS_FILE).write_bytes(save(named(Q, b2, a2)))
    assert outcome(guard) == {"a"}
    found = csulora.load_adapter(guard.outgoing / "a").modules[Q]
    expected = safe(oracle.update(b2, a2, 2.0), subspace, Q)
    assert oracle.relative_error(oracle.update(found.b, found.a), expected) <= TOLERANCE


def test_guard_decides_again_on_another_format_under_the_same_name(
    guard: DirectoryGuard, subspace: csulora.Subspace
) -> None:
    """And on other weights in the same format: what identifies an upload covers them."""
    upload(guard.incoming / "a", named(Q, *factors()))
    assert outcome(guard) == {"a"}
    (guard.incoming / "a" / WEIGHTS_FILE).unlink()
    for seed in (80, 90):
        mlx_upload(guard.incoming / "a", {Q: factors(seed=seed)}, 20.0)
        assert outcome(guard) == {"a"}
        assert not (guard.outgoing / "a" / WEIGHTS_FILE).exists()
        found = csulora.load_adapter(guard.outgoing / "a").modules[Q]
        expected = safe(oracle.update(*factors(seed=seed), 20.0), subspace, Q)
        assert oracle.relative_error(oracle.update(found.b, found.a), expected) <= TOLERANCE
    (guard.incoming / "a" / mlx.WEIGHTS_FILE).unlink()
    upload(guard.incoming / "b", named(Q, *factors()))
    assert outcome(guard) == {"a.refused.json", "b"}


def test_guard_publishes_copies_and_not_links(guard: DirectoryGuard, tmp_path: Path) -> None:
    outside = upload(tmp_path / "outside", named(Q, *factors()))
    path = guard.incoming / "a"
    path.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        os.link(outside / name, path / name)
    outcome(guard)
    before = (guard.outgoing / "a" / WEIGHTS_FILE).read_bytes()
    (outside / WEIGHTS_FILE).write_bytes(save(named(Q, *factors(seed=70))))
    assert (guard.outgoing / "a" / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "a\x1b[2J",
        "evil.refused.json",
        "x" * 240,
        "\u00e9" * 120,
        os.fsdecode(b"\xff\xfe"),
        "-rf",
        "a b",
        "..hidden",
    ],
)
def test_guard_survives_names(name: str, guard: DirectoryGuard) -> None:
    upload(guard.incoming / name, named(Q, *factors()))
    upload(guard.incoming / "good", named(Q, *factors()))
    assert "good" in outcome(guard)
    assert not (guard.outgoing / "evil.refused.json").exists()  # which would tell of a refusal of "evil"
    assert all(path.name.endswith(".refused.json") for path in guard.outgoing.glob("evil*"))


def test_guard_is_not_held_up_by_pipes_and_sparse_files(guard: DirectoryGuard) -> None:
    os.mkfifo(guard.incoming / "pipe")
    os.mkfifo(guard.incoming / "pipe.gguf")
    pipes = upload(guard.incoming / "pipes", named(Q, *factors()))
    (pipes / WEIGHTS_FILE).unlink()
    os.mkfifo(pipes / WEIGHTS_FILE)
    os.truncate(upload(guard.incoming / "sparse", named(Q, *factors())) / WEIGHTS_FILE, 1 << 43)
    (guard.incoming / "sparse.gguf").touch()
    os.truncate(guard.incoming / "sparse.gguf", 1 << 43)
    names_ = ("pipe", "pipe.gguf", "pipes", "sparse", "sparse.gguf")
    assert outcome(guard) == {f"{name}.refused.json" for name in names_}
