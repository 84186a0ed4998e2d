import hashlib
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import Tensor

import factories
from csulora.errors import InputError
from csulora.models.checkpoint import Checkpoint
from csulora.models.comparison import check_comparable, check_one_model

Q = "model.layers.0.self_attn.q_proj"
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save(directory: Path, weights: dict[str, Tensor], **config: object) -> Checkpoint:
    return Checkpoint.open(factories.save_checkpoint(directory, weights, config))


def matrix(rows: int = 6, columns: int = 4, seed: int = 0) -> Tensor:
    return factories.gaussian(rows, columns, seed=seed)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loads_every_matrix_by_name_with_the_hash_of_its_bytes(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    weights = factories.llama_weights(dtype=dtype)
    checkpoint = Checkpoint.open(factories.save_checkpoint(tmp_path / "model", weights, shards=shards))
    matrices = {name.removesuffix(".weight"): weight for name, weight in weights.items() if weight.dim() == 2}
    assert sorted(checkpoint.weights) == sorted(matrices)
    for module, expected in matrices.items():
        loaded, digest = checkpoint.load(module)
        assert torch.equal(loaded, expected)
        assert loaded.dtype == dtype
        assert digest == hashlib.sha256(expected.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_hashes_strip_by_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path / "model", {f"{Q}.weight": matrix()})
    for size in (1, 7, 96, 97):
        monkeypatch.setattr("csulora.models.storage._HASHED_AT_ONCE", size)
        assert checkpoint.load(Q)[1] == factories.sha256(matrix())


def test_is_called_as_its_directory_or_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factories.save_checkpoint(tmp_path / "model", factories.llama_weights())
    assert Checkpoint.open(tmp_path / "model").name == "model"
    monkeypatch.chdir(tmp_path / "model")
    assert Checkpoint.open(".").name == "model"


def test_fetches_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = factories.save_checkpoint(tmp_path / "snapshot", factories.llama_weights())
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    rest = ["README.md", "consolidated.safetensors", "original/params.json", "pytorch_model.bin"]
    fetched = []

    def snapshot_download(repo: str, revision: None, **patterns: list[str]) -> str:
        fetched.append((repo, *filter_repo_objects(wanted + rest, **patterns)))
        return str(directory)

    monkeypatch.setattr("csulora.io.hub.snapshot_download", snapshot_download)
    assert Checkpoint.open("org/model").name == "org/model"
    assert fetched == [("org/model", *wanted)]


def test_a_hub_id_offline_is_one_plain_message() -> None:
    with pytest.raises(InputError, match=r"^org/model: neither a local directory nor .*offline|disabled") as caught:
        Checkpoint.open("org/model")
    assert "\n" not in str(caught.value)


def test_selects_attention_and_mlp_if_no_glob_is_given(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(factories.save_checkpoint(tmp_path / "model", factories.llama_weights(layers=2)))
    assert len(checkpoint.select([])) == 2 * len(KINDS)
    assert {module.rpartition(".")[2] for module in checkpoint.select([])} == set(KINDS)


def test_selects_by_globs(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(factories.save_checkpoint(tmp_path / "model", factories.llama_weights(layers=2)))
    assert checkpoint.select(["q_proj"]) == [Q, Q.replace("0", "1")]
    assert checkpoint.select(["lm_head", "embed_tokens"]) == ["lm_head", "model.embed_tokens"]
    assert checkpoint.select([Q, "layers.0.*.q_proj"]) == [Q]
    assert len(checkpoint.select(["*"])) == 2 * len(KINDS) + 2


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(factories.save_checkpoint(tmp_path / "model", factories.llama_weights()))
    with pytest.raises(
        InputError, match=r"no 2-D weight matches the module pattern 'q_porj'; there is lm_head, for instance$"
    ):
        checkpoint.select(["q_proj", "q_porj"])
    with pytest.raises(InputError, match=r"'model\.norm'; model\.norm is \[48\], and only matrices"):
        checkpoint.select(["model.norm"])


def test_fused_experts_are_not_selected_and_a_glob_that_names_them_is_told_why(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint = save(tmp_path / "model", {f"{Q}.weight": matrix(), experts: torch.zeros(2, 8, 4)})
    assert checkpoint.select([]) == [Q]
    with pytest.raises(InputError, match=rf"{experts} is \[2, 8, 4\], and only matrices called \*\.weight"):
        checkpoint.select(["experts.*"])


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.block_sparse_moe.experts.3.w2",
        "model.layers.0.mlp.gate",
    ],
)
def test_fused_projections_and_single_experts_are_matrices_like_any_other(tmp_path: Path, module: str) -> None:
    weight = matrix()
    checkpoint = save(tmp_path / "model", {f"{module}.weight": weight})
    assert checkpoint.select([]) == [module]
    assert torch.equal(checkpoint.load(module)[0], weight)


def test_conv1d_weights_are_turned_to_out_by_in(tmp_path: Path) -> None:
    stored = {
        "h.0.attn.c_attn.weight": matrix(4, 12),
        "wte.weight": matrix(9, 4),
        "h.0.attn.bias": torch.ones(1, 1, 2, 2),
    }
    checkpoint = save(tmp_path / "gpt2", stored, model_type="gpt2")
    assert checkpoint.weights["h.0.attn.c_attn"].shape == (12, 4)
    assert torch.equal(checkpoint.load("h.0.attn.c_attn")[0], stored["h.0.attn.c_attn.weight"].t())
    assert checkpoint.weights["wte"].shape == (9, 4)
    linear = {name: weight.t().contiguous() if "c_attn" in name else weight for name, weight in stored.items()}
    same_names = save(tmp_path / "other", linear, model_type="gpt_bigcode")
    assert same_names.weights["h.0.attn.c_attn"].shape == (12, 4)


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path: Path) -> None:
    weights = {f"{Q}.weight": matrix(), "model.embed_tokens.weight": matrix(9, 4)}
    tied = save(tmp_path / "tied", weights, tie_word_embeddings=True)
    assert tied.aliases == {"lm_head": "model.embed_tokens"}
    assert tied.select(["lm_head"]) == ["model.embed_tokens"]
    assert save(tmp_path / "untied", weights, tie_word_embeddings=False).aliases == {}
    assert save(tmp_path / "text", weights, text_config={"tie_word_embeddings": False}).aliases == {}
    wrapped = weights | {"language_model.lm_head.weight": matrix(9, 4)}
    assert save(tmp_path / "wrapped", wrapped).aliases == {}
    assert save(tmp_path / "head", weights | {"lm_head.weight": matrix(9, 4)}, tie_word_embeddings=True).aliases == {}


def comparable(base: Checkpoint, aligned: Checkpoint) -> None:
    check_one_model(base, aligned)
    check_comparable(base, aligned, {Q: Q})


def test_storage_types_and_shards_may_differ(tmp_path: Path) -> None:
    weights = factories.llama_weights()
    base = Checkpoint.open(factories.save_checkpoint(tmp_path / "base", weights, shards=2))
    comparable(base, save(tmp_path / "aligned", {name: weight.half() for name, weight in weights.items()}))


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        ({f"{Q}.weight": matrix(6, 5)}, {}, rf"tensor {Q}\.weight is \[6, 4\] in base base and \[6, 5\] in aligned"),
        ({"model.layers.9.mlp.weight": matrix()}, {}, rf"aligned: tensor {Q}\.weight is missing, but base has it"),
        ({f"{Q}.weight": matrix()}, {"model_type": "qwen2"}, r"model_type is llama in base base and qwen2 in aligned"),
        ({f"{Q}.weight": matrix()}, {"architectures": ["Other"]}, r"architectures is \['Llama.* and \['Other'\]"),
        ({f"{Q}.weight": matrix().to(torch.int8)}, {}, rf"aligned: tensor {Q}\.weight is I8, which csulora"),
    ],
)
def test_refuses_checkpoints_that_cannot_be_compared(
    tmp_path: Path, weights: dict[str, Tensor], config: dict[str, object], message: str
) -> None:
    base = save(tmp_path / "base", {f"{Q}.weight": matrix()})
    with pytest.raises(InputError, match=message):
        comparable(base, save(tmp_path / "aligned", weights, **config))


def test_a_checkpoint_without_linear_modules_has_nothing_to_select(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no 2-D weight of a linear module"):
        save(tmp_path / "model", {"model.embed_tokens.weight": matrix()}).select([])


def write_index(directory: Path, shard_of: object) -> Path:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with one shard and no index yet."""
    path = factories.save_checkpoint(tmp_path / "model", {f"{Q}.weight": matrix()})
    return (path / "model.safetensors").rename(path / "one.safetensors").parent


@pytest.mark.parametrize(
    ("shard_of", "message"),
    [
        ({f"{Q}.weight": "../one.safetensors"}, r"\.\./one\.safetensors lies outside the directory"),
        ({f"{Q}.weight": "/one.safetensors"}, "lies outside the directory"),
        (
            {f"{Q}.weight": "two.safetensors"},
            r"two\.safetensors: missing, but model\.safetensors\.index\.json names it",
        ),
        ({f"{Q}.weight": ".."}, "missing, but"),
        ({"x.weight": "one.safetensors"}, r"one\.safetensors: tensor x\.weight is missing"),
        ({f"{Q}.weight": 1}, "weight_map must map"),
        ([], "weight_map must map"),
        (None, "weight_map must map"),
    ],
)
def test_refuses_an_index_that_does_not_fit_its_shards(directory: Path, shard_of: object, message: str) -> None:
    write_index(directory, shard_of)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(directory)


def test_the_single_file_comes_before_an_index(directory: Path) -> None:
    write_index(directory, {f"{Q}.weight": "one.safetensors"})
    save_file({f"{Q}.weight": matrix(3, 2)}, directory / "model.safetensors")
    assert Checkpoint.open(directory).weights[Q].shape == (3, 2)


def test_refuses_a_tensor_in_two_shards(directory: Path) -> None:
    save_file({f"{Q}.weight": matrix(), "x.weight": matrix()}, directory / "two.safetensors")
    write_index(directory, {f"{Q}.weight": "one.safetensors", "x.weight": "two.safetensors"})
    with pytest.raises(InputError, match=rf"two\.safetensors: holds {Q}\.weight, and so does one\.safetensors"):
        Checkpoint.open(directory)


def test_refuses_what_is_no_model(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        Checkpoint.open(directory)
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="not a GGUF file"):
        Checkpoint.open(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        Checkpoint.open(tmp_path / "empty")


@pytest.mark.parametrize("config", ["", "[]", '{"model_type": ["llama"]}', '{"model_type": 1}', '{"a": 1, "a": 1}'])
def test_refuses_a_malformed_config(tmp_path: Path, config: str) -> None:
    directory = factories.save_checkpoint(tmp_path / "model", factories.llama_weights())
    (directory / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"config\.json: "):
        Checkpoint.open(directory)


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_refuses_a_damaged_file(tmp_path: Path, keep: int) -> None:
    directory = factories.save_checkpoint(tmp_path / "model", factories.llama_weights())
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint.open(directory)


def test_says_what_is_left_out(tmp_path: Path) -> None:
    weights = {
        f"{Q}.weight": matrix(),
        "model.embed_tokens.weight": matrix(9, 4),
        "lm_head.weight": matrix(9, 4),
        "model.layers.0.mlp.experts.down_proj": torch.zeros(2, 3, 4),
        "model.norm.weight": torch.zeros(4),
    }
    checkpoint = save(tmp_path / "model", weights)
    assert checkpoint.left_out(checkpoint.select([])) == {
        "embedding": ["model.embed_tokens"],
        "head": ["lm_head"],
        "stacked": ["model.layers.0.mlp.experts.down_proj"],
    }


def test_shards_need_no_index_if_all_are_there(tmp_path: Path) -> None:
    weights = factories.llama_weights()
    whole = Checkpoint.open(factories.save_checkpoint(tmp_path / "whole", weights))
    sharded = factories.save_checkpoint(tmp_path / "sharded", weights, shards=3)
    (sharded / "model.safetensors.index.json").unlink()
    assert Checkpoint.open(sharded).load(Q)[1] == whole.load(Q)[1]
    assert Checkpoint.open(sharded).weights.keys() == whole.weights.keys()
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds shards \[1, 3\] of \[3\] and no .*; is it complete"):
        Checkpoint.open(sharded)
