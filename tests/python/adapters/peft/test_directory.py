"""PEFT's own adapters: what is plain LoRA comes through unchanged, everything else is refused by name."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import csulora
import factories
import oracle
import zoo
from csulora.adapters.peft import directory as peft
from csulora.cli import app as cli
from csulora.errors import InputError, RefusedError
from csulora.models.resolver import Resolver
from tolerances import COMPUTED, STORED

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="session")
def subspaces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[zoo.Kind], csulora.Subspace]:
    made: dict[object, csulora.Subspace] = {}

    def subspace_for(kind: zoo.Kind) -> csulora.Subspace:
        if kind.model not in made:
            base, aligned = zoo.save_model_pair(kind.model, tmp_path_factory.mktemp("pair"))
            globs = ["c_attn", "c_proj", "c_fc"] if kind.model is zoo.gpt2 else ["*_proj", "embed_tokens", "lm_head"]
            made[kind.model] = csulora.extract(base, aligned, rank=4, modules=globs, dtype="f32")
        return made[kind.model]

    return subspace_for


def reload(kind: zoo.Kind, directory: Path) -> dict[str, torch.Tensor]:
    return zoo.updates(PeftModel.from_pretrained(kind.model(), directory))


def oriented(kind: zoo.Kind, update: torch.Tensor) -> torch.Tensor:
    """(out, in) from the layout of the host's weight."""
    return update.t() if kind.model is zoo.gpt2 else update


@pytest.mark.parametrize("name", sorted(zoo.PLAIN_LORA))
def test_the_policy_none_reproduces_pefts_own_update(
    name: str, tmp_path: Path, subspaces: Callable[[zoo.Kind], csulora.Subspace]
) -> None:
    kind = zoo.PLAIN_LORA[name]
    original = zoo.updates(kind.make(tmp_path / "adapter"))
    adapter = csulora.load_adapter(tmp_path / "adapter")
    assert set(adapter.modules) == set(original)
    fixed, _ = csulora.correct(adapter, subspaces(kind), csulora.Policy.none())
    csulora.save_adapter(fixed, tmp_path / "fixed")
    written = reload(kind, tmp_path / "fixed")
    assert set(written) == set(original)
    tolerance = 1e-6 if kind.dtype == torch.float32 else STORED[kind.dtype]
    for module, update in original.items():
        assert oracle.relative_error(written[module], update.double()) <= tolerance
    stored = load_file(tmp_path / "fixed" / peft.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {kind.dtype}


@pytest.mark.parametrize("rank", ["exact", "keep"])
@pytest.mark.parametrize("name", sorted(zoo.PLAIN_LORA))
def test_peft_applies_the_closest_safe_update(
    name: str, rank: csulora.policy.policy.Rank, tmp_path: Path, subspaces: Callable[[zoo.Kind], csulora.Subspace]
) -> None:
    kind = zoo.PLAIN_LORA[name]
    original = zoo.updates(kind.make(tmp_path / "adapter"))
    subspace, policy = subspaces(kind), csulora.Policy.csulora(3.0, rank=rank)
    adapter = csulora.load_adapter(tmp_path / "adapter")
    fixed, _ = csulora.correct(adapter, subspace, policy)
    csulora.save_adapter(fixed, tmp_path / "fixed")
    for module, written in reload(kind, tmp_path / "fixed").items():
        found = Resolver(subspace, subspace.aliases).resolve(module)
        assert found is not None
        target = found.module
        factors = adapter.modules[module]
        update = oracle.update(factors.b, factors.a, factors.scale)
        assert oracle.relative_error(oriented(kind, original[module]), update) <= STORED[kind.dtype]
        expected = oracle.closest_safe_update(update, subspace[target].u, subspace[target].v, (0.0, 3.0, 3.0))
        if rank == "keep":
            left, values, right = torch.linalg.svd(expected, full_matrices=False)
            kept = factors.rank
            expected = (left[:, :kept] * values[:kept]) @ right[:kept]
        tolerance = COMPUTED[torch.float32] + STORED[kind.dtype]
        assert oracle.relative_error(oriented(kind, written), expected) <= tolerance


@pytest.mark.parametrize("name", sorted(zoo.PLAIN_LORA))
def test_every_scale_in_the_written_directory_is_one(
    name: str, tmp_path: Path, subspaces: Callable[[zoo.Kind], csulora.Subspace]
) -> None:
    kind = zoo.PLAIN_LORA[name]
    kind.make(tmp_path / "adapter")
    fixed, _ = csulora.correct(csulora.load_adapter(tmp_path / "adapter"), subspaces(kind), csulora.Policy.csulora())
    csulora.save_adapter(fixed, tmp_path / "fixed")
    config = json.loads((tmp_path / "fixed" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["use_rslora"] is False
    assert all(module.scale == 1 for module in csulora.load_adapter(tmp_path / "fixed").modules.values())
    model = PeftModel.from_pretrained(kind.model(), tmp_path / "fixed")
    assert {module.scaling["default"] for module in model.modules() if hasattr(module, "get_delta_weight")} == {1.0}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    modules = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.self_attn.q_proj": (32, 32)}
    return factories.save_adapter(tmp_path / "plain", modules)


def test_patterns_keep_their_order_of_which_the_first_that_matches_counts(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in factories.SHAPES.items() if name.endswith("q_proj")}
    patterns = {"q_proj": 3, ".*layers.0.*": 5}
    factories.save_adapter(tmp_path / "adapter", shapes, rank=3, rank_pattern=patterns, r=4)
    fixed, _ = csulora.correct(
        csulora.load_adapter(tmp_path / "adapter"), factories.subspace(), csulora.Policy.csulora()
    )
    csulora.save_adapter(fixed, tmp_path / "fixed")
    assert csulora.load_adapter(tmp_path / "fixed").modules.keys() == fixed.modules.keys()


def run_correct(adapter: Path, subspace: csulora.Subspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of `csulora correct`."""
    subspace.save(tmp_path / "subspace.safetensors")
    arguments = [
        "correct",
        "--policy",
        "csulora",
        str(adapter),
        "--subspace",
        str(tmp_path / "subspace.safetensors"),
        "-o",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["csulora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


REASONS = {
    "DoRA": "use_dora",
    "lora_bias": "lora_bias",
    "bias": "bias is set",
    "PiSSA": "init_lora_weights is 'pissa'",
    "PiSSA, iterated": "pissa_niter_4",
    "OLoRA": "olora",
    "modules_to_save": "modules_to_save",
    "trainable tokens": "trainable_token_indices",
    "aLoRA": "alora_invocation_tokens",
    "layer_replication": "layer_replication",
    "target_parameters": "updates fused experts",
    "saved embedding": "save_embedding_layers=False",
}


@pytest.mark.parametrize("name", sorted(zoo.OTHER_THAN_PLAIN_LORA))
def test_what_is_not_plain_lora_is_refused_by_name(
    name: str,
    tmp_path: Path,
    subspaces: Callable[[zoo.Kind], csulora.Subspace],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    zoo.OTHER_THAN_PLAIN_LORA[name].make(tmp_path / "adapter")
    assert run_correct(tmp_path / "adapter", subspaces(zoo.PLAIN_LORA["plain"]), tmp_path, monkeypatch) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("csulora: refused: ")
    assert output.err.count("\n") == 1
    assert REASONS[name] in output.err
    assert not (tmp_path / "out").exists()


Edit = Callable[[dict[str, object], dict[str, torch.Tensor]], None]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def configured(**changes: object) -> Edit:
    return lambda config, _: config.update(changes)


def added(name: str, tensor: torch.Tensor | None = None) -> Edit:
    return lambda _, tensors: tensors.update({name: torch.ones(4, 32) if tensor is None else tensor})


def removed(name: str) -> Edit:
    def edit(_: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return edit


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(_: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return edit


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1, -1] = value
        return tensor

    return poison


REFUSED, BAD = 3, 4
EDITS: dict[str, tuple[Edit, int, str]] = {
    "unknown field": (configured(use_new_lora=True), REFUSED, "'use_new_lora'"),
    "KaSA": (configured(kasa_config={"beta": 1}), REFUSED, "kasa_config is set"),
    "QALoRA": (configured(use_qalora=True), REFUSED, "use_qalora is set"),
    "BD-LoRA": (configured(use_bdlora={"nblocks": 2}), REFUSED, "use_bdlora is set"),
    "MonteCLoRA": (configured(monteclora_config={"n": 1}), REFUSED, "monteclora_config is set"),
    "Arrow": (configured(arrow_config={"top_k": 1}), REFUSED, "arrow_config is set"),
    "VeLoRA": (configured(velora_config={"n": 1}), REFUSED, "velora_config is set"),
    "Megatron": (configured(megatron_config={"n": 1}), REFUSED, "megatron_config is set"),
    "tying as text": (configured(ensure_weight_tying="true"), BAD, "ensure_weight_tying"),
    "LoRA-GA": (configured(init_lora_weights="lora_ga"), REFUSED, "changes the base weights"),
    "CorDA": (configured(init_lora_weights="corda"), REFUSED, "corda"),
    "LoftQ": (configured(init_lora_weights="loftq"), REFUSED, "loftq"),
    "unknown initialisation": (configured(init_lora_weights="new"), REFUSED, "'new'"),
    "another method": (configured(peft_type="LOHA"), REFUSED, "LOHA"),
    "no method": (configured(peft_type=None), REFUSED, "peft_type"),
    "untargeted": (configured(target_modules=["k_proj"]), REFUSED, "does not target"),
    "excluded": (configured(exclude_modules=["q_proj"]), REFUSED, "does not target"),
    "another layer": (configured(layers_to_transform=[0]), REFUSED, "layers.1.self_attn.q_proj"),
    "slow pattern": (configured(target_modules="(a|a|[a-z._0-9])*" * 12 + "!"), REFUSED, "too long to match"),
    "long pattern": (configured(target_modules="q" * 20_000), REFUSED, "longer than"),
    "broken pattern": (configured(target_modules="(q_proj"), BAD, "regular expression"),
    "no targets": (configured(target_modules=None), BAD, "target_modules is missing"),
    "no rank": (configured(r=None), BAD, "r is missing"),
    "rank zero": (configured(r=0), BAD, "rank"),
    "rank beyond all numbers": (configured(r=10**400, use_rslora=True), BAD, "rank"),
    "rank as text": (configured(r="4"), BAD, "rank"),
    "rank of another size": (configured(r=5), BAD, "rank 5"),
    "rank of another size by pattern": (configured(rank_pattern={"q_proj": 3}), BAD, "rank 3"),
    "alpha as text": (configured(lora_alpha="8"), BAD, "alpha"),
    "alpha beyond float64": (configured(lora_alpha=10**400), BAD, "alpha"),
    "alpha beyond float64 by pattern": (configured(alpha_pattern={"q_proj": -(10**400)}), BAD, "alpha"),
    "alpha true": (configured(lora_alpha=True), BAD, "alpha"),
    "pattern not a mapping": (configured(alpha_pattern=[1]), BAD, "alpha_pattern"),
    "alpha beyond float32": (configured(lora_alpha=1e300), BAD, "too large"),
    "rsLoRA as text": (configured(use_rslora="yes"), BAD, "use_rslora"),
    "DoRA magnitude": (added(f"{FIRST}.lora_magnitude_vector"), REFUSED, "DoRA"),
    "factor bias": (added(f"{FIRST}.lora_B.bias"), REFUSED, "factors have biases"),
    "module bias": (added(f"{FIRST}.bias"), REFUSED, "biases of the base model"),
    "saved module": (added("base_model.model.lm_head.modules_to_save.weight"), REFUSED, "whole modules"),
    "saved base layer": (added(f"{FIRST}.base_layer.weight"), REFUSED, "weight of the base model"),
    "another adapter": (added(f"{FIRST}.lora_A.other.weight"), REFUSED, "the adapter's name, 'other', in it"),
    "lower case": (added(f"{FIRST}.lora_a.weight"), REFUSED, "neither lora_A nor lora_B"),
    "no prefix": (added("model.layers.0.self_attn.q_proj.lora_A.weight"), REFUSED, "does not start with"),
    "doubled prefix": (added(f"base_model.model.{FIRST}.lora_A.weight"), REFUSED, "does not start with"),
    "unknown tensor": (added("base_model.model.norm.weight"), REFUSED, "no such tensor"),
    "line break in a name": (added(f"{FIRST}\n.lora_A.weight"), REFUSED, "not part of plain LoRA"),
    "missing A": (removed(f"{FIRST}.lora_A.weight"), BAD, "lora_A.weight is missing"),
    "missing B": (removed(f"{FIRST}.lora_B.weight"), BAD, "lora_B.weight is missing"),
    "NaN": (changed(f"{FIRST}.lora_A.weight", poisoned(math.nan)), BAD, "NaN or infinity"),
    "infinity": (changed(f"{FIRST}.lora_B.weight", poisoned(-math.inf)), BAD, "NaN or infinity"),
    "wrong rank": (changed(f"{FIRST}.lora_A.weight", lambda a: a[:2]), BAD, "says rank 4"),
    "wrong shape": (changed(f"{FIRST}.lora_B.weight", lambda b: b[:30]), BAD, "30, 32"),
    "a vector": (changed(f"{FIRST}.lora_B.weight", lambda b: b[0]), BAD, "a matrix is needed"),
    "convolution": (changed(f"{FIRST}.lora_A.weight", lambda a: a[:, :, None, None]), REFUSED, "convolutions"),
    "an integer type": (changed(f"{FIRST}.lora_A.weight", torch.Tensor.int), BAD, "float64 is needed"),
    "float64 beyond float32": (changed(f"{FIRST}.lora_A.weight", lambda a: a.double() * 1e300), BAD, "cannot hold"),
    "linear and embedding": (added(f"{FIRST}.lora_embedding_A"), BAD, "is missing"),
    "not in the subspace file": (
        lambda config, tensors: (
            config.update(target_modules=["q_proj", "gate"]),
            tensors.update(
                {
                    "base_model.model.model.gate.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.model.gate.lora_B.weight": torch.ones(32, 4),
                }
            ),
        ),
        REFUSED,
        "does not cover module model.gate",
    ),
}


@pytest.mark.parametrize("name", sorted(EDITS))
def test_what_does_not_fit_is_refused_in_one_line(
    name: str,
    plain: Path,
    tmp_path: Path,
    subspaces: Callable[[zoo.Kind], csulora.Subspace],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, code, reason = EDITS[name]
    config, tensors = json.loads((plain / "adapter_config.json").read_text()), load_file(plain / peft.WEIGHTS_FILE)
    edit(config, tensors)
    (plain / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, plain / peft.WEIGHTS_FILE)
    subspace = subspaces(zoo.PLAIN_LORA["plain"])
    capsys.readouterr()  # what transformers said while the fixtures were made
    assert run_correct(plain, subspace, tmp_path, monkeypatch) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert reason in output.err
    assert str(plain) in output.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not readable as JSON"),
        (b"[]", "not a JSON object"),
        (b'{"r": NaN}', "r is NaN; write a finite number"),
        (b'{"r": 1, "r": 2}', "a key stands twice"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_broken_configuration_is_a_bad_input(content: bytes, reason: str, plain: Path) -> None:
    (plain / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        csulora.load_adapter(plain)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}rest"])
def test_broken_weights_are_a_bad_input(content: bytes, plain: Path) -> None:
    (plain / peft.WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        csulora.load_adapter(plain)


def test_an_adapter_without_tensors_is_a_bad_input(plain: Path) -> None:
    save_file({}, plain / peft.WEIGHTS_FILE)
    with pytest.raises(InputError, match="holds no factor"):
        csulora.load_adapter(plain)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickle_files_are_refused(name: str, plain: Path) -> None:
    (plain / peft.WEIGHTS_FILE).rename(plain / name)
    with pytest.raises(RefusedError, match="pickle"):
        csulora.load_adapter(plain)


def test_an_adapter_that_matches_nothing_is_refused(
    tmp_path: Path, subspaces: Callable[[zoo.Kind], csulora.Subspace]
) -> None:
    stranger = factories.save_adapter(tmp_path / "stranger", {"other.q_proj": (32, 32)})
    for fate in ({}, {"drop_uncovered": ("*",)}, {"keep_uncovered": ("*",)}):
        with pytest.raises(RefusedError, match=r"does not cover|covers none"):
            csulora.correct(
                csulora.load_adapter(stranger),
                subspaces(zoo.PLAIN_LORA["plain"]),
                csulora.Policy.csulora(**fate),
            )


@pytest.fixture
def partly_covered(tmp_path: Path) -> csulora.Adapter:
    modules = {"model.layers.0.self_attn.q_proj": (32, 32), "model.extra.q_proj": (32, 32)}
    return csulora.load_adapter(factories.save_adapter(tmp_path / "partly", modules))


def test_dropped_modules_are_not_targeted_either(
    tmp_path: Path, partly_covered: csulora.Adapter, subspaces: Callable[[zoo.Kind], csulora.Subspace]
) -> None:
    subspace = subspaces(zoo.PLAIN_LORA["plain"])
    fixed, _ = csulora.correct(partly_covered, subspace, csulora.Policy.csulora(drop_uncovered=("*",)))
    csulora.save_adapter(fixed, tmp_path / "fixed")
    config = json.loads((tmp_path / "fixed" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert set(csulora.load_adapter(tmp_path / "fixed").modules) == {"model.layers.0.self_attn.q_proj"}


def test_kept_modules_keep_their_update(
    tmp_path: Path, partly_covered: csulora.Adapter, subspaces: Callable[[zoo.Kind], csulora.Subspace]
) -> None:
    subspace = subspaces(zoo.PLAIN_LORA["plain"])
    fixed, _ = csulora.correct(partly_covered, subspace, csulora.Policy.csulora(keep_uncovered=("*",)))
    csulora.save_adapter(fixed, tmp_path / "fixed")
    before = partly_covered.modules["model.extra.q_proj"]
    after = csulora.load_adapter(tmp_path / "fixed").modules["model.extra.q_proj"]
    update = oracle.update(before.b, before.a, before.scale)
    assert oracle.relative_error(oracle.update(after.b, after.a, after.scale), update) <= STORED[torch.float32]


def test_a_scale_that_overflows_the_storage_type_is_a_bad_input(tmp_path: Path) -> None:
    adapter = csulora.load_adapter(
        factories.save_adapter(tmp_path / "large", {"a.q_proj": (8, 8)}, dtype=torch.float16, lora_alpha=4e6)
    )
    with pytest.raises(InputError, match="does not fit"):
        csulora.save_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_written_bytes_are_golden(tmp_path: Path) -> None:
    module = csulora.LoraModule(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), scale=0.5)
    adapter = csulora.Adapter({"model.q_proj": module}, {"r": 1, "lora_alpha": 0.5}, Path("made"), "")
    csulora.save_adapter(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").read_text() == GOLDEN_CONFIG
    assert (tmp_path / "out" / peft.WEIGHTS_FILE).read_bytes() == GOLDEN_HEADER + bytes.fromhex(
        "00004040000080400000003f0000803f"
    )


GOLDEN_CONFIG = """{
  "alpha_pattern": {},
  "base_model_name_or_path": null,
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "lora_alpha": 1,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 1,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "model.q_proj"
  ],
  "task_type": null,
  "use_dora": false,
  "use_rslora": false
}
"""
_HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"base_model.model.model.q_proj.lora_A.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    b'"base_model.model.model.q_proj.lora_B.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}}'
)
_PADDED = _HEADER + b" " * (-len(_HEADER) % 8)
GOLDEN_HEADER = len(_PADDED).to_bytes(8, "little") + _PADDED


@pytest.mark.parametrize(
    "module",
    [
        csulora.LoraModule(torch.ones(4, 0), torch.ones(0, 3)),
        csulora.LoraModule(torch.ones(4, 2), torch.ones(3, 3)),
        csulora.LoraModule(torch.ones(4), torch.ones(4, 3)),
        csulora.LoraModule(torch.ones(4, 2).to(torch.float8_e5m2), torch.ones(2, 3).to(torch.float8_e5m2)),
    ],
    ids=["rank 0", "other ranks", "vector", "float8"],
)
@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_what_could_not_be_read_back_is_not_written(
    module: csulora.LoraModule, format: Literal["peft", "mlx"], tmp_path: Path
) -> None:
    adapter = csulora.Adapter({"model.layers.0.mlp.up_proj": module}, {}, Path("made"), "")
    with pytest.raises(InputError, match=r"made: model.layers.0.mlp.up_proj has b \[4.*\] .* are needed"):
        csulora.save_adapter(adapter, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(4, 2).to_sparse()}, r"b is no dense tensor; give b.to_dense\(\)"),
        ({"a": torch.ones(2, 3).to_sparse_coo()}, r"a is no dense tensor; give a.to_dense\(\)"),
        ({"a": torch.ones(2, 3, device="meta")}, "a has no memory and holds no numbers; load its weights"),
        ({"a": factories.without_memory(2, 3)}, "a has no memory and holds no numbers; load its weights"),
        ({"b": torch.nn.UninitializedParameter()}, "b has no memory and holds no numbers; load its weights"),
        ({"b": torch.tensor(1.0)}, "b is a single number; give a matrix"),
        ({"a": np.ones((2, 3))}, "a is a ndarray; give a torch.Tensor"),
        ({"b": None}, "b is a NoneType; give a torch.Tensor"),
        ({"scale": "2"}, "scale is '2'; give a finite number"),
        ({"scale": None}, "scale is None; give a finite number"),
        ({"scale": torch.ones(2)}, ".*give a finite number"),
        ({"scale": Fraction(1, 2)}, ".*give a finite number"),
        ({"scale": 1j}, "scale is 1j; give a finite number"),
        ({"scale": float("nan")}, "scale is nan; give a finite number"),
        ({"scale": 10**400}, ".*give a finite number"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_holds_no_numbers_is_neither_written_nor_corrected(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = factories.adapter({"model.layers.0.mlp.up_proj": (64, 48)})
    bad = {name: replace(module, **change) for name, module in good.modules.items()}
    adapter = replace(good, modules=bad)
    for format in ("peft", "mlx", "gguf"):
        with pytest.raises(InputError, match=f"model.layers.0.mlp.up_proj: {message}"):
            csulora.save_adapter(adapter, tmp_path / "out", format, base_model="model")
    with pytest.raises(InputError, match=f"model.layers.0.mlp.up_proj: {message}"):
        csulora.correct(adapter, factories.subspace(), csulora.Policy.none())
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_modules_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="made: has no modules"):
        csulora.save_adapter(csulora.Adapter({}, {}, Path("made"), ""), tmp_path / "out")


def test_what_float32_cannot_hold_is_not_written(tmp_path: Path) -> None:
    module = csulora.LoraModule(torch.full((4, 2), 1e300, dtype=torch.float64), torch.ones(2, 3).double(), 1.0)
    adapter = csulora.Adapter({"model.layers.0.mlp.up_proj": module}, {}, Path("made"), "")
    with pytest.raises(InputError, match="float32 cannot hold"):
        csulora.save_adapter(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_is_not_finite_is_not_written(value: float, scale: float, tmp_path: Path) -> None:
    b = torch.ones(4, 2)
    b[3, 1] = value
    module = csulora.LoraModule(b, torch.ones(2, 3), scale)
    adapter = csulora.Adapter({"model.layers.0.mlp.up_proj": module}, {}, Path("made"), "")
    with pytest.raises(InputError, match=r"made: model.layers.0.mlp.up_proj holds NaN or infinity"):
        csulora.save_adapter(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())
