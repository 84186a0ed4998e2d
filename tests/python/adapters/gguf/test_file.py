from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

import csulora
import factories
import gguf_files
from csulora.adapters.gguf import file as gguf
from csulora.adapters.lora import Adapter, LoraModule
from csulora.errors import InputError, RefusedError
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_file import GGUFFile

GOLDEN = Path(__file__).with_name("golden_lora.gguf")

ROUND_TRIP = 1e-6
SAME_CORRECTION = 1e-5

LAYER = "model.layers.0"
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (48, 48),
    f"{LAYER}.self_attn.k_proj": (24, 48),
    f"{LAYER}.self_attn.v_proj": (24, 48),
    f"{LAYER}.mlp.down_proj": (48, 64),
    "model.layers.1.self_attn.o_proj": (48, 48),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save_model(tmp_path_factory.mktemp("model") / "model.gguf", factories.llama_weights())


@pytest.fixture
def tied_model(tmp_path: Path) -> Path:
    weights = factories.llama_weights()
    del weights["lm_head.weight"]
    return gguf_files.save_model(tmp_path / "tied.gguf", weights)


def peft(directory: Path, **config: object) -> Adapter:
    return csulora.load_adapter(factories.save_adapter(directory / "adapter", SHAPES, **config))


def adapter(modules: dict[str, LoraModule]) -> Adapter:
    return Adapter(modules, {"base_model_name_or_path": "meta/tiny"}, Path("some-adapter"), "0" * 64)


def linear(rows: int, columns: int, rank: int = 2, scale: float = 1.0) -> LoraModule:
    return LoraModule(factories.gaussian(rows, rank, seed=1), factories.gaussian(rank, columns, seed=2), scale)


def embedding(rows: int = 40, columns: int = 48) -> LoraModule:
    return replace(linear(rows, columns), is_embedding=True)


def update(module: LoraModule) -> Tensor:
    return module.scale * module.b.double() @ module.a.double()


def distance(one: Adapter, other: Adapter) -> float:
    """The largest relative difference between two updates of the same module."""
    assert one.modules.keys() == other.modules.keys()
    return max(
        float((update(module) - update(other.modules[name])).norm() / update(module).norm())
        for name, module in one.modules.items()
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 7},
        {"alpha_pattern": {"q_proj": 3, "down_proj": 0.7}},
        {"lora_alpha": -5},
    ],
    ids=["plain", "rsLoRA", "alpha_pattern", "negative"],
)
def test_peft_to_gguf_to_peft_keeps_every_update(config: dict[str, object], model: Path, tmp_path: Path) -> None:
    original = peft(tmp_path, **config)
    csulora.save_adapter(original, tmp_path / "lora.gguf", "gguf", base_model=model)
    csulora.save_adapter(csulora.load_adapter(tmp_path / "lora.gguf", model), tmp_path / "back", "peft")
    assert distance(original, csulora.load_adapter(tmp_path / "back", "peft")) <= ROUND_TRIP


def test_a_model_directory_serves_as_well_as_its_gguf_file(model: Path, tmp_path: Path) -> None:
    directory = factories.save_checkpoint(
        tmp_path / "directory",
        factories.llama_weights(),
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": gguf_files.HEADS,
            "num_key_value_heads": gguf_files.KV_HEADS,
            "vocab_size": 40,
        },
    )
    ours, theirs = BaseModel.open(directory), BaseModel.open(model)
    assert ours.shapes == theirs.shapes
    assert (ours.counts, ours.is_tied) == (theirs.counts, theirs.is_tied)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_types(kind: str, model: Path, tmp_path: Path) -> None:
    original = peft(tmp_path)
    csulora.save_adapter(original, tmp_path / "lora.gguf", "gguf", base_model=model, outtype=kind)
    back = csulora.load_adapter(tmp_path / "lora.gguf", model)
    assert {module.b.dtype for module in back.modules.values()} == {gguf.OUTTYPES[kind]}
    assert distance(original, back) <= {"f32": ROUND_TRIP, "f16": 1e-3, "bf16": 1e-2}[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeps_the_storage_type_unless_told(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    original = peft(tmp_path, dtype=dtype)
    csulora.save_adapter(original, tmp_path / "lora.gguf", "gguf", base_model=model)
    back = csulora.load_adapter(tmp_path / "lora.gguf", model)
    assert all(module.a.dtype == dtype for module in back.modules.values())
    name = f"{LAYER}.mlp.down_proj"
    assert torch.equal(back.modules[name].a, original.modules[name].a)


@pytest.mark.parametrize("preset", ["csulora", "protect", "project", "none"])
def test_correcting_before_and_after_conversion_is_the_same(preset: str, model: Path, tmp_path: Path) -> None:
    subspace = csulora.extract(*factories.model_pair(tmp_path / "pair"), rank=6)
    policy = getattr(csulora.Policy, preset)(rank="exact")
    original = peft(tmp_path, use_rslora=True)

    before, _ = csulora.correct(original, subspace, policy)
    csulora.save_adapter(before, tmp_path / "before.gguf", "gguf", base_model=model)
    csulora.save_adapter(original, tmp_path / "raw.gguf", "gguf", base_model=model)
    after, _ = csulora.correct(csulora.load_adapter(tmp_path / "raw.gguf", model), subspace, policy)

    assert distance(csulora.load_adapter(tmp_path / "before.gguf", model), after) <= SAME_CORRECTION


def test_says_what_it_was_made_from(model: Path, tmp_path: Path) -> None:
    subspace = csulora.extract(*factories.model_pair(tmp_path / "pair"), rank=6)
    original = peft(tmp_path, base_model_name_or_path="meta/tiny")
    corrected, _ = csulora.correct(original, subspace, csulora.Policy.project())
    csulora.save_adapter(corrected, tmp_path / "lora.gguf", "gguf", base_model=model)
    file = GGUFFile.map(tmp_path / "lora.gguf")
    assert file.text("csulora.version") == csulora.__version__
    assert file.text("csulora.adapter.sha256") == original.sha256
    assert file.text("csulora.subspace.sha256") == subspace.sha256
    assert '"partial": "inf"' in (file.text("csulora.policy") or "")
    assert file.text("general.base_model.0.name") == "tiny"
    assert file.float32("adapter.lora.alpha") == 0
    back = csulora.load_adapter(tmp_path / "lora.gguf", model)
    assert back.config["base_model_name_or_path"] == "meta/tiny"


def test_golden_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written changes only on purpose: then write the golden file anew and say so in the changelog."""
    monkeypatch.setattr(gguf, "__version__", "0")
    base = replace(BaseModel.open(gguf_files.save_model(tmp_path / "m.gguf", factories.llama_weights())), license="mit")
    b, a = torch.arange(48.0).reshape(24, 2), torch.arange(96.0).reshape(2, 48)
    updates = {
        f"{LAYER}.self_attn.k_proj": LoraModule(b, a, 0.5),
        f"{LAYER}.self_attn.v_proj": LoraModule(b.half(), a.half()),
        f"{LAYER}.mlp.up_proj": LoraModule(torch.ones(64, 1).bfloat16(), torch.ones(1, 48).bfloat16(), -2.0),
        "model.embed_tokens": LoraModule(torch.ones(40, 1), a[:1], is_embedding=True),
    }
    gguf.write(adapter(updates), tmp_path / "lora.gguf", base)
    assert (tmp_path / "lora.gguf").read_bytes() == GOLDEN.read_bytes()


def test_alpha_is_divided_by_each_tensors_rank(model: Path, tmp_path: Path) -> None:
    tensors = {
        f"blk.0.attn_{part}.weight.lora_{factor}": torch.ones(shape)
        for part, rank in (("v", 2), ("output", 5))
        for factor, shape in (("a", (rank, 48)), ("b", (24 if part == "v" else 48, rank)))
    }
    path = gguf_files.save_lora(tmp_path / "lora.gguf", tensors)
    modules = csulora.load_adapter(path, model).modules
    assert modules[f"{LAYER}.self_attn.v_proj"].scale == 4
    assert modules[f"{LAYER}.self_attn.o_proj"].scale == pytest.approx(8 / 5, rel=1e-7)


def test_without_alpha_there_is_no_scale(model: Path, tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_up.weight.lora_a": torch.ones(2, 48), "blk.0.ffn_up.weight.lora_b": torch.ones(64, 2)}
    metadata = {"general.type": "adapter", "adapter.type": "lora"}
    path = gguf_files.save_lora(tmp_path / "lora.gguf", tensors, metadata=metadata)
    assert csulora.load_adapter(path, model).modules[f"{LAYER}.mlp.up_proj"].scale == 1


def test_a_factor_of_rank_1_may_have_one_dimension(model: Path, tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_up.weight.lora_a": torch.ones(48), "blk.0.ffn_up.weight.lora_b": torch.ones(64, 1)}
    path = gguf_files.save_lora(tmp_path / "lora.gguf", tensors)
    assert csulora.load_adapter(path, model).modules[f"{LAYER}.mlp.up_proj"].a.shape == (1, 48)


def test_only_reordered_rows_need_the_base_model(tmp_path: Path) -> None:
    def save(part: str, rows: int, name: str) -> Path:
        tensors = {f"blk.0.{part}.weight.lora_a": torch.ones(2, 48), f"blk.0.{part}.weight.lora_b": torch.ones(rows, 2)}
        return gguf_files.save_lora(tmp_path / f"{name}.gguf", tensors, name=name)

    assert list(csulora.load_adapter(save("attn_q", 48, "qwen2")).modules) == [f"{LAYER}.self_attn.q_proj"]
    assert list(csulora.load_adapter(save("attn_v", 24, "llama")).modules) == [f"{LAYER}.self_attn.v_proj"]
    with pytest.raises(InputError, match=r"order of the rows of .*q_proj follows from the model.*--base-model"):
        csulora.load_adapter(save("attn_q", 48, "llama"))


def write(modules: dict[str, LoraModule], model: Path, tmp_path: Path, outtype: str | None = None) -> None:
    csulora.save_adapter(adapter(modules), tmp_path / "out.gguf", "gguf", base_model=model, outtype=outtype)


@pytest.mark.parametrize("name", ["embed_tokens", "model.embed_tokens"])
def test_refuses_a_token_embedding_that_is_the_head(name: str, tied_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"one matrix, which llama\.cpp cannot adapt"):
        write({name: embedding()}, tied_model, tmp_path)


def test_refuses_a_head_that_is_the_token_embedding(tied_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"one matrix, which llama\.cpp cannot adapt"):
        write({"lm_head": linear(40, 48)}, tied_model, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.experts.0.w4",
        "model.layers.00.mlp.up_proj",
        "blk.0.ffn_up",
        "visual.proj",
    ],
)
def test_refuses_what_llama_cpp_has_no_place_for(name: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=f"no llama tensor for {name}"):
        write({name: linear(64, 48)}, model, tmp_path)


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ({"model.layers.2.mlp.up_proj": linear(64, 48)}, InputError, "does not exist in"),
        ({"model.layers.0.mlp.experts.0.up_proj": linear(64, 48)}, InputError, "does not exist in"),
        ({"model.layers.0.mlp.up_proj": linear(64, 47)}, InputError, r"\[64, 47\] matrix, but it is \[64, 48\]"),
        ({"model.layers.0.mlp.up_proj": embedding(64)}, RefusedError, "as an embedding"),
        ({"model.embed_tokens": linear(40, 48)}, RefusedError, "as no embedding"),
        ({"model.layers.0.mlp.up_proj": linear(64, 48, scale=1e39)}, InputError, "with its scale does not fit"),
        (
            {"model.layers.0.mlp.up_proj": linear(64, 48), "layers.0.mlp.up_proj": linear(64, 48)},
            InputError,
            r"is a second update of model\.layers\.0\.mlp\.up_proj",
        ),
    ],
    ids=["layer", "expert", "shape", "embedding", "no embedding", "overflow", "twice"],
)
def test_refuses_what_does_not_fit(
    modules: dict[str, LoraModule], error: type[Exception], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        write(modules, model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_values_beyond_float16(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit torch\.float16"):
        write({"model.layers.0.mlp.up_proj": linear(64, 48, scale=1e6)}, model, tmp_path, "f16")


@pytest.mark.parametrize("outtype", ["f32", "bf16"])
def test_factors_that_want_a_gradient_are_written(outtype: str, model: Path, tmp_path: Path) -> None:
    plain = linear(64, 48)
    trained = replace(plain, b=plain.b.clone().requires_grad_(), a=plain.a.clone().requires_grad_())
    for name, module in (("plain", plain), ("trained", trained)):
        made = adapter({"model.layers.0.mlp.up_proj": module})
        csulora.save_adapter(made, tmp_path / f"{name}.gguf", "gguf", base_model=model, outtype=outtype)
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "trained.gguf").read_bytes()


def test_refuses_to_overwrite_an_input(model: Path, tmp_path: Path) -> None:
    path = gguf_files.save_lora(
        tmp_path / "lora.gguf",
        {"blk.0.ffn_up.weight.lora_a": torch.ones(2, 48), "blk.0.ffn_up.weight.lora_b": torch.ones(64, 2)},
    )
    before = path.read_bytes()
    with pytest.raises(InputError, match="is read, or lies in what is read"):
        csulora.save_adapter(csulora.load_adapter(path, model), path, "gguf", base_model=model)
    with pytest.raises(InputError, match="is read, or lies in what is read"):
        csulora.save_adapter(csulora.load_adapter(path, model), model, "gguf", base_model=model)
    assert path.read_bytes() == before


def test_needs_a_base_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--base-model"):
        csulora.save_adapter(adapter({"lm_head": linear(4, 4)}), tmp_path / "x.gguf", "gguf")


def test_refuses_unknown_types_and_formats(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outtype 'q8_0'"):
        write({"model.layers.0.mlp.up_proj": linear(64, 48)}, model, tmp_path, "q8_0")
    with pytest.raises(InputError, match="unknown adapter format"):
        csulora.save_adapter(adapter({"lm_head": linear(4, 4)}), tmp_path / "x", "onnx")


@pytest.mark.parametrize("kind", ["both", "a alone"])
def test_q8_0_factors_are_read_as_gguf_dequantises_them(kind: str, tmp_path: Path) -> None:
    """A factor b of rank 8 has no whole blocks, so that llama.cpp's converter leaves it in float16."""
    a, b = factories.gaussian(32, 64, seed=1), factories.gaussian(48, 32, seed=2)
    writer = GGUFWriter(tmp_path / "lora.gguf", "llama")
    gguf_files.add_metadata(writer, gguf_files.LORA)
    stored = quants.quantize(a.numpy(), GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    if kind == "both":
        other = quants.quantize(b.numpy(), GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.ffn_up.weight.lora_b", other, raw_dtype=GGMLQuantizationType.Q8_0)
        expected = torch.from_numpy(quants.dequantize(other, GGMLQuantizationType.Q8_0))
    else:
        writer.add_tensor("blk.0.ffn_up.weight.lora_b", b.half().numpy())
        expected = b.half().float()
    gguf_files.close(writer)
    module = csulora.load_adapter(tmp_path / "lora.gguf").modules["model.layers.0.mlp.up_proj"]
    assert torch.equal(module.a, torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType.Q8_0)))
    assert torch.equal(module.b, expected)


def test_q8_0_with_a_scale_that_is_not_finite_is_a_bad_input(tmp_path: Path) -> None:
    stored = quants.quantize(torch.ones(4, 32).numpy(), GGMLQuantizationType.Q8_0)
    stored[0, :2] = [0, 0x7E]  # the block's float16 scale
    writer = GGUFWriter(tmp_path / "lora.gguf", "llama")
    gguf_files.add_metadata(writer, gguf_files.LORA)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", torch.ones(48, 4).numpy())
    gguf_files.close(writer)
    with pytest.raises(InputError, match="NaN or infinity"):
        csulora.load_adapter(tmp_path / "lora.gguf")
