"""The safetensors files of adapters, written byte by byte: what safetensors itself reads, and what it refuses."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from csulora.adapters import weights_files
from csulora.adapters.weights_files import read_weights, tensors_in
from csulora.errors import InputError

F16 = {"dtype": "F16", "shape": [1, 2]}


def file_of(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(path: Path) -> dict[str, torch.Tensor]:
    return tensors_in(read_weights([path], lambda name, path: None))


def by_safetensors(content: bytes) -> dict[str, torch.Tensor] | None:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, RuntimeError):  # the last is torch's, of shapes whose product overflows
        return None


def assert_like_safetensors(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    expected = by_safetensors(content)
    if expected is None:
        with pytest.raises(InputError, match="not a readable safetensors file"):
            read(path)
        return
    found = read(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize(
    "header",
    [
        {"a": F16 | {"data_offsets": [0, 4]}},
        {"a": F16 | {"data_offsets": [4, 8]}, "b": F16 | {"data_offsets": [0, 4]}},
        {"a": F16 | {"data_offsets": [0, 4]}, "b": F16 | {"data_offsets": [0, 4]}},
        {"a": F16 | {"data_offsets": [0, 4]}, "b": F16 | {"data_offsets": [2, 6]}},
        {"a": F16 | {"data_offsets": [1, 5]}},
        {"a": F16 | {"data_offsets": [4, 0]}},
        {"a": F16 | {"data_offsets": [0, 4, 8]}},
        {"a": F16 | {"data_offsets": [0.0, 4.0]}},
        {"a": F16 | {"data_offsets": "04"}},
        {"a": F16 | {"data_offsets": [-4, 0]}},
        {"a": F16},
        {"a": None},
        {"a": {"dtype": "F16", "shape": [-1, -2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F16", "shape": [1, 3], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F16", "shape": "12", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F16", "shape": [2**63, 2**63], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F17", "shape": [1, 2], "data_offsets": [0, 4]}},
        {"a": {"dtype": [], "shape": [1, 2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": F16 | {"data_offsets": [1, 5]}},
        {"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "b": F16 | {"data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2**34, 0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2**34, 2**34, 0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0, 2**34, 2**34], "data_offsets": [0, 0]}},
        {"a": F16 | {"data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}},
        {"a": F16 | {"data_offsets": [0, 4]}, "__metadata__": None},
        {"a": F16 | {"data_offsets": [0, 4]}, "__metadata__": 5},
        {"a": F16 | {"data_offsets": [0, 4]}, "__metadata__": ["format"]},
        {"a": F16 | {"data_offsets": [0, 4]}, "__metadata__": {"format": 5}},
    ],
)
@pytest.mark.parametrize("size", [0, 4, 5, 8])
def test_headers_are_read_and_refused_as_by_safetensors(header: dict[str, Any], size: int, tmp_path: Path) -> None:
    assert_like_safetensors(file_of(header, bytes(range(size))), tmp_path / "file")


numbers = st.integers(-1, 9)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "BF16", "F32", "F64", "U8", "I8", "BOOL"]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2),
    }
)


@given(st.dictionaries(st.sampled_from("abc"), entries, min_size=1), st.integers(0, 9))
def test_random_headers_too(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int) -> None:
    assert_like_safetensors(file_of(header, b"\1" * size), tmp_path_factory.getbasetemp() / "random")


def test_a_shape_of_very_many_numbers_is_not_multiplied(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(file_of({"a": {"dtype": "F16", "shape": [2**33] * 300_000, "data_offsets": [0, 4]}}, bytes(4)))

    with pytest.raises(InputError, match="does not fit"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_a_header_is_utf_8(encoding: str, tmp_path: Path) -> None:
    text = json.dumps({"a": F16 | {"data_offsets": [0, 4]}}).encode(encoding)
    path = tmp_path / "file"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))

    assert by_safetensors(path.read_bytes()) is None
    with pytest.raises(InputError, match="not readable as JSON"):
        read(path)


@pytest.mark.parametrize("part", [3, 64, 1 << 20])
def test_what_is_read_in_parts_is_hashed_in_order(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_files, "_PART", part)
    tensors = {name: torch.randn(5, 7) for name in "ab"}
    safetensors.torch.save_file(tensors, tmp_path / "file")

    (found,) = read_weights([tmp_path / "file"], lambda name, path: None)

    assert found.sha256 == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("at", "value"), [(0, math.nan), (-1, -math.inf), (5000, 1.0)])
def test_what_is_not_finite_is_seen_wherever_it_lies(
    dtype: torch.dtype, at: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_files, "_PART", 4096)
    path, tensors = tmp_path / "file", {"a": torch.ones(100, dtype=dtype), "b": torch.ones(99, 101, dtype=dtype)}
    tensors["b"].view(-1)[at] = value
    safetensors.torch.save_file(tensors, path)
    (file,) = read_weights([path], lambda name, path: None)
    assert file.is_finite == math.isfinite(value)


@pytest.mark.parametrize("types", [(torch.float16, torch.float32), (torch.int16, torch.int16), ()])
def test_of_other_types_it_is_not_known_whether_they_are_finite(types: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    safetensors.torch.save_file({f"{i}": torch.ones(4, dtype=t) for i, t in enumerate(types)}, tmp_path / "file")
    (file,) = read_weights([tmp_path / "file"], lambda name, path: None)
    assert not file.is_finite


def test_a_file_that_becomes_shorter_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    safetensors.torch.save_file({"a": torch.ones(1 << 16, 2)}, path)

    def shorten(name: str, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(InputError, match="became shorter"):
        read_weights([path], shorten)
