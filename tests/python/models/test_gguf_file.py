"""The container as gguf's own reader sees it; adapters/gguf/test_malformed.py has what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_files
from csulora.errors import InputError
from csulora.models.gguf_file import GGUFFile

values = st.one_of(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.text(min_size=1, max_size=20),  # gguf's writer leaves out empty strings
    st.floats(width=32, allow_nan=False),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5),
)
names = st.text("abc._0", min_size=1, max_size=12)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=30)  # gguf's reader is slow
@given(
    st.dictionaries(names, values, max_size=6),
    st.dictionaries(names, shapes, min_size=1, max_size=5),
    st.sampled_from([1, 8, 32, 128]),
)
def test_agrees_with_ggufs_reader(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, object],
    tensors: dict[str, list[int]],
    alignment: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    gguf_files.add_metadata(writer, {f"x.{key}": value for key, value in metadata.items()})
    for i, (name, shape) in enumerate(tensors.items()):
        writer.add_tensor(name, np.full(shape, i, (np.float16, np.float32)[i % 2]))
    gguf_files.close(writer)

    file, reader = GGUFFile.map(path), GGUFReader(path)
    theirs = {name: found for name, found in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.fields.keys() == theirs.keys()
    for name, found in file.fields.items():
        assert found.type == theirs[name].types[0]
    for key, value in metadata.items():
        read = {str: file.text, int: file.integer, float: file.float32}.get(type(value))
        assert read is None or read(f"x.{key}") == value
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert (info.type, info.start, info.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert bytes(file.bytes_of(tensor.name)) == tensor.data.tobytes()


def test_reading_and_mapping_are_the_same(tmp_path: Path) -> None:
    path = gguf_files.save_lora(tmp_path / "x.gguf", {"a": np.ones((2, 3), np.float32)})
    mapped, read = GGUFFile.map(path), GGUFFile.read(path, 1 << 20)
    assert bytes(mapped.data) == bytes(read.data) == path.read_bytes()
    assert mapped.tensors == read.tensors
    assert mapped.fields == read.fields


def test_what_is_absent_is_none(tmp_path: Path) -> None:
    file = GGUFFile.map(gguf_files.save_lora(tmp_path / "x.gguf", {"a": np.ones(1, np.float32)}))
    assert file.text("nothing") is file.integer("nothing") is file.float32("nothing") is None


def test_refuses_other_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("empty", "is empty"),
        ("pipe", "not a regular file"),
        (".", "Is a directory"),
        ("no", "no such"),
    ):
        with pytest.raises(InputError, match=reason):
            GGUFFile.map(tmp_path / name)
    with pytest.raises(InputError, match="at most 10 are read"):
        GGUFFile.read(gguf_files.save_lora(tmp_path / "x", {"a": np.ones(1, np.float32)}), 10)
