"""PEFT adapters whose weights are spread over several files, as transformers' save_pretrained spreads them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import csulora
import factories
import zoo
from csulora.adapters import weights_files
from csulora.errors import InputError, RefusedError
from csulora.serving.guard.uploads import content_sha256, contents_of, signature_of

INDEX = "adapter_model.safetensors.index.json"


def spread(directory: Path, shards: int = 2, index: bool = True) -> Path:
    """Spread an adapter's weights over several files."""
    factories.save_adapter(directory, factories.SHAPES)
    whole = directory / "adapter_model.safetensors"
    tensors, shard_of = load_file(whole), {}
    whole.unlink()
    for shard in range(shards):
        file = f"adapter_model-{shard + 1:05}-of-{shards:05}.safetensors"
        chosen = dict(sorted(tensors.items())[shard::shards])
        save_file(chosen, directory / file)
        shard_of |= dict.fromkeys(chosen, file)
    if index:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return directory


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_make_one_adapter(shards: int, index: bool, tmp_path: Path) -> None:
    factories.save_adapter(tmp_path / "whole", factories.SHAPES)
    whole, found = (csulora.load_adapter(path) for path in (tmp_path / "whole", spread(tmp_path / "a", shards, index)))
    assert found.modules.keys() == whole.modules.keys()
    assert all(torch.equal(found.modules[name].b, module.b) for name, module in whole.modules.items())
    csulora.save_adapter(found, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_spreads_is_read(tmp_path: Path) -> None:
    model = zoo.llama()
    model.add_adapter(LoraConfig(r=4, target_modules=zoo.ATTENTION, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", max_shard_size="4KB")
    assert len(list((tmp_path / "adapter").glob("adapter_model-*.safetensors"))) > 1
    assert len(csulora.load_adapter(tmp_path / "adapter").modules) == len(zoo.ATTENTION) * zoo.LAYERS


def first(directory: Path) -> Path:
    return min(directory.glob("adapter_model-*.safetensors"))


def without_a_shard(directory: Path) -> None:
    first(directory).unlink()


def without_a_shard_and_index(directory: Path) -> None:
    first(directory).unlink()
    (directory / INDEX).unlink()


def with_a_tensor_twice(directory: Path) -> None:
    tensors = load_file(first(directory))
    last = max(directory.glob("adapter_model-*.safetensors"))
    save_file(load_file(last) | tensors, last)


def with_an_index_that_leads_outside(directory: Path) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


def with_an_index_that_names_more(directory: Path) -> None:
    document = json.loads((directory / INDEX).read_text())
    document["weight_map"]["base_model.model.x.lora_A.weight"] = first(directory).name
    (directory / INDEX).write_text(json.dumps(document))


def with_a_short_shard(directory: Path) -> None:
    first(directory).write_bytes(first(directory).read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_a_shard, "missing, but .*index.json names it"),
        (without_a_shard_and_index, r"holds shards \[2\] of \[2\] .*is it complete"),
        (with_a_tensor_twice, "and so does another file"),
        (with_an_index_that_leads_outside, "lies outside the directory"),
        (with_an_index_that_names_more, "is missing, but the index names it"),
        (with_a_short_shard, "is it complete"),
    ],
)
def test_what_is_incomplete_is_a_bad_input(damage: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    damage(spread(tmp_path / "adapter"))
    with pytest.raises(InputError, match=reason):
        csulora.load_adapter(tmp_path / "adapter")


def test_a_strange_tensor_in_any_shard_is_refused(tmp_path: Path) -> None:
    last = max(spread(tmp_path / "adapter").glob("adapter_model-*.safetensors"))
    save_file(load_file(last) | {"base_model.model.model.norm.weight": torch.ones(40)}, last)
    with pytest.raises(RefusedError, match="not part of plain LoRA"):
        csulora.load_adapter(tmp_path / "adapter")


def test_all_shards_together_have_one_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread(tmp_path / "adapter")
    sizes = [path.stat().st_size for path in (tmp_path / "adapter").glob("adapter_model-*.safetensors")]
    monkeypatch.setattr(weights_files, "LARGEST_WEIGHTS", sum(sizes) - 1)
    with pytest.raises(InputError, match="are read"):
        csulora.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("limit", "error", "reason"),
    [("_MOST_TENSORS", RefusedError, "holds 3 tensors; at most"), ("_LONGEST_HEADER", InputError, "is too long")],
)
def test_all_headers_together_have_one_limit(
    limit: str, error: type[Exception], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = first(spread(tmp_path / "adapter"))
    header = int.from_bytes(file.read_bytes()[:8], "little")
    monkeypatch.setattr(weights_files, limit, {"_MOST_TENSORS": 5, "_LONGEST_HEADER": 2 * header - 1}[limit])
    with pytest.raises(error, match=reason):
        csulora.load_adapter(tmp_path / "adapter")


def test_what_identifies_an_adapter_covers_every_shard(tmp_path: Path) -> None:
    """The hash, and a directory guard's."""
    directory = spread(tmp_path / "adapter")
    hashes = []
    for file in [None, *sorted(directory.glob("adapter_model-*.safetensors"))]:
        if file:
            save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
        upload = content_sha256(contents_of(directory, signature_of(directory)))
        hashes.append((csulora.load_adapter(directory).sha256, upload))
    assert len({adapter for adapter, _ in hashes}) == len({upload for _, upload in hashes}) == 3
