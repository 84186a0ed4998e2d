"""Updates of experts in GGUF files, against models whose tensors are made by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import csulora
import gguf_files
from csulora.adapters import experts
from csulora.adapters.lora import Adapter, LoraModule
from csulora.errors import InputError, RefusedError
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_file import GGUFFile
from csulora.subspace.expert_layout import ExpertLayout

EXPERTS, WIDTH, HIDDEN, RANK = 3, 32, 16, 2
EXPERT = "model.layers.0.mlp.experts.{}.{}"
PROJECTIONS = {"gate_proj": (HIDDEN, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}


def save_model(path: Path, *, fused: bool = False, name: str = "qwen3moe", **others: Tensor) -> Path:
    shapes = {"down": (WIDTH, HIDDEN)}
    shapes |= {"gate_up": (2 * HIDDEN, WIDTH)} if fused else {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH)}
    tensors = {f"blk.0.ffn_{kind}_exps.weight": torch.randn(EXPERTS, *shape) for kind, shape in shapes.items()}
    return gguf_files.save_lora(path, tensors | others, name, {"general.name": "tiny"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model.gguf")


def factors(kind: str = "up", number: int = EXPERTS, rows: int = HIDDEN, columns: int = WIDTH) -> dict[str, Tensor]:
    return {
        f"blk.0.ffn_{kind}_exps.weight.lora_a": torch.randn(number, RANK, columns),
        f"blk.0.ffn_{kind}_exps.weight.lora_b": torch.randn(number, rows, RANK),
    }


def adapter_of(modules: dict[str, LoraModule]) -> Adapter:
    return Adapter(modules, {}, Path("adapter"), "0" * 64)


def update(projection: str, rank: int = RANK, scale: float = 0.5) -> LoraModule:
    rows, columns = PROJECTIONS[projection]
    return LoraModule(torch.randn(rows, rank), torch.randn(rank, columns), scale)


def load(path: Path, base: Path) -> dict[str, LoraModule]:
    return experts.decoded(csulora.load_adapter(path, base), ExpertLayout()).modules


def product(module: LoraModule) -> Tensor:
    return module.scale * module.b.double() @ module.a.double()


def test_experts_without_an_update_and_smaller_ranks_get_zeros(model: Path, tmp_path: Path) -> None:
    modules = {EXPERT.format(0, "up_proj"): update("up_proj", 4), EXPERT.format(2, "up_proj"): update("up_proj", 1)}
    csulora.save_adapter(adapter_of(modules), tmp_path / "lora.gguf", base_model=model)
    tensors = GGUFFile.map(tmp_path / "lora.gguf").tensors
    assert [info.shape for info in tensors.values()] == [(EXPERTS, 4, WIDTH), (EXPERTS, HIDDEN, 4)]
    read = load(tmp_path / "lora.gguf", model)
    assert not product(read[EXPERT.format(1, "up_proj")]).any()
    for name, module in modules.items():
        torch.testing.assert_close(product(read[name]), product(module), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("projections", [["gate_proj"], ["up_proj"], ["gate_proj", "up_proj"]])
def test_a_model_with_gate_and_up_in_one_tensor(projections: list[str], tmp_path: Path) -> None:
    base = save_model(tmp_path / "model.gguf", fused=True)
    modules = {EXPERT.format(1, projection): update(projection) for projection in projections}
    csulora.save_adapter(adapter_of(modules), tmp_path / "lora.gguf", base_model=base)
    read = load(tmp_path / "lora.gguf", base)
    assert len(read) == 2 * EXPERTS
    for name, module in read.items():
        expected = product(modules[name]) if name in modules else torch.zeros_like(product(module))
        torch.testing.assert_close(product(module), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [3e5, 3e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gate_and_up_of_other_types_and_scales_are_one_update(
    alpha: float, dtype: torch.dtype, model: Path, tmp_path: Path
) -> None:
    """What fuses them neither casts one to the other's type nor lets a scale overflow it."""
    up = {name: tensor.to(dtype) for name, tensor in factors("up").items()}
    gate = {
        name: torch.cat([tensor, tensor], 2 if name.endswith("b") else 1).half()
        for name, tensor in factors("gate").items()
    }
    metadata = gguf_files.LORA | {"adapter.lora.alpha": alpha}
    lora = gguf_files.save_lora(tmp_path / "lora.gguf", gate | up, "qwen3moe", metadata)
    read = load(lora, model)
    for kind, tensors, rank in (("gate", gate, 2 * RANK), ("up", up, RANK)):
        a, b = (tensors[f"blk.0.ffn_{kind}_exps.weight.lora_{factor}"].double() for factor in "ab")
        for expert in range(EXPERTS):
            expected = alpha / rank * b[expert] @ a[expert]
            found = product(read[EXPERT.format(expert, f"{kind}_proj")])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors(number=2), r"updates of 2 experts, but .*model\.gguf has 3"),
        (factors(number=4), r"updates of 4 experts, but .*model\.gguf has 3"),
        (factors(rows=HIDDEN + 1), r"updates a \[17, 32\] matrix, but it is \[16, 32\]"),
        (factors(columns=WIDTH - 1), r"updates a \[16, 31\] matrix, but it is \[16, 32\]"),
        (factors("gate_up", rows=2 * HIDDEN), r"ffn_gate_up_exps does not exist in"),
        ({key.replace("blk.0", "blk.1"): tensor for key, tensor in factors().items()}, "does not exist in"),
    ],
    ids=["fewer", "more", "rows", "columns", "fused", "layer"],
)
def test_what_does_not_fit_the_model_is_refused(
    tensors: dict[str, Tensor], message: str, model: Path, tmp_path: Path
) -> None:
    lora = gguf_files.save_lora(tmp_path / "lora.gguf", tensors, "qwen3moe")
    with pytest.raises(InputError, match=message):
        csulora.load_adapter(lora, model)


def damaged(factor: str, value: float) -> dict[str, Tensor]:
    tensors = factors()
    tensors[f"blk.0.ffn_up_exps.weight.{factor}"][1, 0, 0] = value
    return tensors


A, B = (f"blk.0.ffn_up_exps.weight.lora_{factor}" for factor in "ab")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (damaged("lora_a", float("nan")), r"lora_a holds NaN or infinity for expert 1"),
        (damaged("lora_b", float("inf")), r"lora_b holds NaN or infinity for expert 1"),
        (factors() | {A: torch.ones(2, RANK, WIDTH)}, r"unlike number of experts or rank"),
        (factors() | {A: torch.ones(EXPERTS, RANK + 1, WIDTH)}, r"unlike number of experts or rank"),
        (factors() | {A: torch.ones(RANK, WIDTH)}, r"lora_a is \[2, 32\]; a matrix for each expert is needed"),
        ({A: factors()[A]}, r"blk\.0\.ffn_up_exps has no lora_b"),
        (factors("gate_up", rows=2 * HIDDEN + 1), r"33 rows; gate and up have as many each"),
        ({A: torch.ones(5000, 1, 1), B: torch.ones(5000, 1, 1)}, r"5000 experts; at most 4096 are possible"),
    ],
    ids=["NaN", "infinity", "experts", "rank", "matrix", "half", "odd", "many"],
)
def test_damaged_files_are_refused_without_the_model(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    lora = gguf_files.save_lora(tmp_path / "lora.gguf", tensors, "qwen3moe")
    with pytest.raises(InputError, match=message):
        csulora.load_adapter(lora)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (EXPERT.format(EXPERTS, "up_proj"), InputError, r"experts\.3\.up_proj does not exist in"),
        (EXPERT.format("01", "up_proj"), RefusedError, r"no qwen3moe tensor for"),
        ("model.layers.0.feed_forward.experts.0.up_proj", RefusedError, r"no qwen3moe tensor for"),
        ("model.layers.0.mlp.up_proj", RefusedError, r"no qwen3moe tensor for"),
    ],
    ids=["expert", "spelling", "owner", "dense"],
)
def test_adapters_of_other_experts_are_not_written(
    module: str, error: type[Exception], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        csulora.save_adapter(adapter_of({module: update("up_proj")}), tmp_path / "lora.gguf", base_model=model)
    assert not list(tmp_path.iterdir())


def test_shapes_that_differ_are_not_written(model: Path, tmp_path: Path) -> None:
    wrong = LoraModule(torch.ones(HIDDEN, RANK), torch.ones(RANK, WIDTH - 1))
    with pytest.raises(InputError, match=r"updates a \[16, 31\] matrix, but it is \[16, 32\]"):
        csulora.save_adapter(adapter_of({EXPERT.format(0, "up_proj"): wrong}), tmp_path / "lora.gguf", base_model=model)


def scales(*values: float) -> dict[str, Tensor]:
    return {"blk.0.ffn_down_exps.scale": torch.tensor(values)}


def test_outputs_that_are_scaled_first_scale_the_update(tmp_path: Path) -> None:
    """llama.cpp adds updates of Gemma 4's experts behind the scale, and transformers before it."""
    base = save_model(tmp_path / "model.gguf", fused=True, name="gemma4", **scales(2.0, 0.5, 1.0))
    name = "model.layers.0.experts.{}.down_proj"
    modules = {name.format(expert): update("down_proj") for expert in range(EXPERTS)}
    lora = tmp_path / "lora.gguf"
    csulora.save_adapter(adapter_of(modules), lora, base_model=base)
    with pytest.raises(InputError, match=r"the scale of the rows of .*name the base model"):
        csulora.load_adapter(lora)
    for key, module in load(lora, base).items():
        torch.testing.assert_close(product(module), product(modules[key]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [((float("nan"), 1.0, 1.0), "holds a scale that is no number"), ((0.0, 1.0, 1.0), "by 0; its updates cannot")],
)
def test_scales_that_cannot_be_undone(values: tuple[float, ...], message: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "model.gguf", fused=True, name="gemma4", **scales(*values))
    lora = gguf_files.save_lora(tmp_path / "lora.gguf", factors("down", rows=WIDTH, columns=HIDDEN), "gemma4")
    with pytest.raises(InputError, match=message):
        csulora.load_adapter(lora, base)


def test_the_identity_of_a_model_tells_how_gate_and_up_lie(tmp_path: Path) -> None:
    files = [save_model(tmp_path / f"{fused}.gguf", fused=fused) for fused in (False, True)]
    separate, fused = map(BaseModel.open, files)
    assert separate.shapes == fused.shapes
    assert separate.identity != fused.identity
