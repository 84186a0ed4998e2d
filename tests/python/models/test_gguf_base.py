import json
from pathlib import Path

import pytest
import torch

import csulora
import factories
import gguf_files
from csulora.errors import InputError, RefusedError
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_file import GGUFFile

CONFIG = {
    "model_type": "mistral",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}


def directory(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


def test_a_config_is_enough(tmp_path: Path) -> None:
    base = BaseModel.open(directory(tmp_path / "model", num_key_value_heads=2, head_dim=10))
    assert base.architecture.name == "llama"
    assert base.shapes["model.layers.1.self_attn.q_proj"] == (40, 48)
    assert base.shapes["model.layers.1.self_attn.k_proj"] == (20, 48)
    assert base.shapes["model.layers.0.mlp.down_proj"] == (48, 64)
    assert base.shapes["lm_head"] == (40, 48)
    assert len(base.shapes) == 2 * 7 + 2


def test_without_a_number_of_key_heads_there_are_as_many_as_of_queries(tmp_path: Path) -> None:
    assert BaseModel.open(directory(tmp_path / "model")).counts == {"heads": 4, "kv_heads": 4}
    weights = factories.llama_weights()
    file = gguf_files.save_model(tmp_path / "m.gguf", weights, metadata={"llama.attention.head_count_kv": 4})
    assert BaseModel.open(file).counts["kv_heads"] == 4


@pytest.mark.parametrize("tie", [True, None])
def test_is_tied_unless_it_says_otherwise(tie: object, tmp_path: Path) -> None:
    assert BaseModel.open(directory(tmp_path / "model", tie_word_embeddings=tie)).is_tied


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("no header", None),
        ("---\n{{{\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
    ],
)
def test_finds_the_licence_in_the_model_card(card: str, expected: str | None, tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    (path / "README.md").write_text(card)
    assert BaseModel.open(path).license == expected


def test_takes_name_and_licence_from_a_gguf_file(tmp_path: Path) -> None:
    metadata = {"general.name": "Tiny", "general.license": "apache-2.0"}
    base = BaseModel.open(gguf_files.save_model(tmp_path / "m.gguf", factories.llama_weights(), metadata=metadata))
    assert (base.name, base.license) == ("Tiny", "apache-2.0")


def test_identity_is_that_of_what_files_depend_on(tmp_path: Path) -> None:
    one, two = (
        BaseModel.open(directory(tmp_path / name / "model")) for name in ("a", "b") if not (tmp_path / name).mkdir()
    )
    assert one.identity == two.identity
    other = BaseModel.open(directory(tmp_path / "a" / "other", num_key_value_heads=2))
    assert other.identity != one.identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "at most 10000"),
        ({"vocab_size": "40"}, "vocab_size is 40"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"head_dim": 9}, "not 4 heads of even size"),
    ],
)
def test_refuses_configs_that_make_no_sense(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        BaseModel.open(directory(tmp_path / "model", **change))


def test_refuses_other_architectures(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="model_type 'mamba'"):
        BaseModel.open(directory(tmp_path / "model", model_type="mamba"))


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"general.type": "adapter"}, InputError, "a model is needed"),
        ({"split.count": 3, "split.no": 0}, InputError, "rename it to NAME-00001-of-00003.gguf"),
        ({"split.count": 3, "split.no": 1}, InputError, "is part 2 of 3; name the first"),
        ({"llama.attention.head_count": [4, 4]}, InputError, "one integer is needed"),
        ({"llama.attention.head_count": 0}, InputError, "head_count is 0"),
        ({"llama.attention.head_count": 5}, InputError, "not 5 heads of even size"),
    ],
)
def test_refuses_gguf_files_that_are_no_usable_model(
    metadata: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = gguf_files.save_model(tmp_path / "m.gguf", factories.llama_weights(), metadata=metadata)
    with pytest.raises(error, match=message):
        BaseModel.open(path)


def test_refuses_an_architecture_that_is_not_on_the_list(tmp_path: Path) -> None:
    path = gguf_files.save_lora(tmp_path / "m.gguf", {"a": torch.ones(1)}, name="mamba", metadata={})
    with pytest.raises(RefusedError, match="architecture 'mamba' is not supported"):
        BaseModel.of_files([GGUFFile.map(path)])


def test_refuses_models_of_another_order_under_the_same_name(tmp_path: Path) -> None:
    metadata = {"glm4.rope.dimension_sections": [8, 12, 12, 0]}
    path = gguf_files.save_lora(tmp_path / "m.gguf", {"a": torch.ones(1)}, name="glm4", metadata=metadata)
    with pytest.raises(RefusedError, match="which also sees; the order of its rows is not supported"):
        BaseModel.of_files([GGUFFile.map(path)])


# As on the hub: what has its default value is left out.
GEMMA_3 = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1},
}


def test_headers_of_the_weights_tell_what_the_config_leaves_out(tmp_path: Path) -> None:
    stem = "language_model.model.layers.0"
    weights = {
        f"{stem}.self_attn.q_proj.weight": torch.ones(40, 48),
        f"{stem}.input_layernorm.weight": torch.ones(48),
        "language_model.model.embed_tokens.weight": torch.ones(9, 48),
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
    }
    base = BaseModel.open(factories.save_checkpoint(tmp_path / "model", weights, GEMMA_3))
    assert base.architecture.name == "gemma3"
    assert base.shapes == {"model.layers.0.self_attn.q_proj": (40, 48), "model.embed_tokens": (9, 48)}


@pytest.mark.parametrize("change", [{"text_config": None}, {"text_config": 3}, {"tie_word_embeddings": [True]}])
def test_what_a_config_holds_in_place_of_a_setting_is_no_setting(change: dict[str, object], tmp_path: Path) -> None:
    assert BaseModel.open(directory(tmp_path / "model", **change)).architecture.name == "llama"


@pytest.mark.parametrize("has_head", [True, False])
def test_headers_tell_whether_there_is_a_head_if_the_config_does_not(has_head: bool, tmp_path: Path) -> None:
    weights = factories.llama_weights()
    if not has_head:
        del weights["lm_head.weight"]
    path = factories.save_checkpoint(tmp_path / "model", weights, CONFIG | {"tie_word_embeddings": None})
    assert BaseModel.open(path).is_tied != has_head


def test_a_config_that_leaves_sizes_out_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_3))
    with pytest.raises(InputError, match="num_attention_heads is None"):
        BaseModel.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lfm2"}))
    with pytest.raises(
        InputError, match=r"does not tell all shapes of a lfm2 model .*; name a local directory that holds"
    ):
        BaseModel.open(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    metadata = {"llama.block_count": 2, "llama.nextn_predict_layers": 1}
    base = BaseModel.open(gguf_files.save_model(tmp_path / "m.gguf", factories.llama_weights(), metadata=metadata))
    assert {module.split(".")[2] for module in base.shapes if ".layers." in module} == {"0"}


def split(directory: Path, parts: int = 3) -> list[Path]:
    """A model as llama-gguf-split spreads it: the metadata in the first part, the tensors over all."""
    weights = factories.llama_weights()
    matrices = [name for name, weight in weights.items() if weight.dim() == 2]
    paths = [directory / f"model-{number + 1:05}-of-{parts:05}.gguf" for number in range(parts)]
    for number, path in enumerate(paths):
        chosen = {name: weights[name] for name in matrices[number::parts]}
        counts: dict[str, int] = {"split.no": number, "split.count": parts, "split.tensors.count": len(matrices)}
        gguf_files.save_model(path, chosen, metadata=counts)
    return paths


def test_the_first_part_stands_for_all(tmp_path: Path) -> None:
    whole = BaseModel.open(gguf_files.save_model(tmp_path / "model.gguf", factories.llama_weights()))
    found = BaseModel.open(split(tmp_path)[0])
    assert found.shapes == whole.shapes
    assert found.identity == whole.identity


def test_no_part_of_the_base_model_is_overwritten(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    adapter = factories.adapter({"model.layers.0.mlp.up_proj": (64, 48)})
    with pytest.raises(InputError, match="lies in what is read"):
        csulora.save_adapter(adapter, second, base_model=first)
    csulora.save_adapter(adapter, tmp_path / "lora.gguf", base_model=first)


def test_a_missing_part_is_told_until_it_is_there(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    elsewhere = second.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model-00002-of-00003.gguf: is missing; put all 3 parts"):
        BaseModel.open(first)
    elsewhere.rename(second)
    BaseModel.open(first)


def test_parts_of_two_models_are_told(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(InputError, match="says that it is part 2 of 3; is it of another model"):
        BaseModel.open(first)
    second.write_bytes(content)
    gguf_files.save_model(third, {}, metadata={"split.no": 2, "split.count": 3})
    with pytest.raises(InputError, match="speaks of 16 tensors, and its parts hold 11"):
        BaseModel.open(first)


def test_a_repository_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory(tmp_path / "model")
    asked: list[object] = []

    def snapshot_download(repo: str, allow_patterns: list[str], **_: object) -> str:
        asked.append((repo, allow_patterns))
        return str(tmp_path / "model")

    monkeypatch.setattr("csulora.io.hub.snapshot_download", snapshot_download)
    assert BaseModel.open("org/model").shapes == BaseModel.open(tmp_path / "model").shapes
    assert asked == [("org/model", ["config.json", "README.md"])]
