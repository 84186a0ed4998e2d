"""The GGUF container (versions 2 and 3, little-endian): metadata and tensors of a file, within bounds.

gguf's own reader keeps several objects per element of a metadata array and believes every count, so a small file
can make it take gigabytes. Here every length is compared with the bytes that are left before anything is made of
it, array elements are stepped over, and tensors must lie one behind the other as llama.cpp wants them. Types,
block sizes and dequantisers are gguf's.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from struct import Struct
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from csulora.errors import InputError
from csulora.io.files import open_regular

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)

_LONGEST_HEADER = 64 << 20  # bytes, of a file that is read; vocabularies of large models have some 20 MiB

# Far above what real files have, so that names and offsets stay a few tens of MiB.
_MOST_ENTRIES = 1 << 16
_LONGEST_KEY = 1 << 10  # bytes
_LONGEST_TENSOR_NAME = 63  # bytes; ggml's limit
_MOST_DIMENSIONS = 4  # ggml's limit
_MOST_STRINGS = 1 << 21  # in arrays of one file; vocabularies and merges of large models have some 600,000

_U32, _U64 = Struct("<I"), Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: Struct("<B"),
    GGUFValueType.INT8: Struct("<b"),
    GGUFValueType.UINT16: Struct("<H"),
    GGUFValueType.INT16: Struct("<h"),
    GGUFValueType.UINT32: _U32,
    GGUFValueType.INT32: Struct("<i"),
    GGUFValueType.FLOAT32: Struct("<f"),
    GGUFValueType.BOOL: Struct("<?"),
    GGUFValueType.UINT64: _U64,
    GGUFValueType.INT64: Struct("<q"),
    GGUFValueType.FLOAT64: Struct("<d"),
}
_INTEGERS = frozenset(
    {
        GGUFValueType.UINT8,
        GGUFValueType.INT8,
        GGUFValueType.UINT16,
        GGUFValueType.INT16,
        GGUFValueType.UINT32,
        GGUFValueType.INT32,
        GGUFValueType.UINT64,
        GGUFValueType.INT64,
    }
)


@dataclass(frozen=True)
class Field:
    """A metadata value: its type and where its bytes lie."""

    type: GGUFValueType
    start: int
    size: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: its shape with the contiguous dimension last, its type, and where its bytes lie."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """Metadata and tensors of one file, by name. Nothing is decoded before it is asked for."""

    def __init__(self, path: Path, data: bytearray | mmap.mmap, size: int | None = None) -> None:
        """Read the header; use `GGUFFile.read` or `GGUFFile.map`.

        Args:
            path: what messages call the file.
            data: its bytes, or as many of the first as hold the header.
            size: how many it has.

        Raises:
            InputError: the file is no GGUF file, is truncated, or its parts contradict each other.
        """
        self.path = path
        self.data = memoryview(data)
        cursor = _Cursor(path, self.data, len(self.data) if size is None else size)
        tensors, fields = _read_preamble(cursor)
        self.fields = dict(_read_fields(cursor, fields))
        self.tensors = dict(_read_tensors(cursor, tensors, self._alignment()))

    @classmethod
    def read(cls, path: Path, limit: int) -> GGUFFile:
        """Read a whole file of at most ``limit`` bytes into memory.

        It is not mapped: a process dies of a mapped file that somebody makes shorter. What is malformed is refused
        before memory is taken for its data.
        """
        with open_regular(path, limit) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LONGEST_HEADER:
                cls(path, _filled(file, _LONGEST_HEADER), size)
                file.seek(0)
            return cls(path, _filled(file, size))

    @classmethod
    def map(cls, path: Path) -> GGUFFile:
        """Map a file; its pages are read when they are used."""
        with open_regular(path) as file:
            return cls(path, _mapped(file, path))

    def text(self, key: str) -> str | None:
        """Return a string value; None if the key is absent.

        Raises:
            InputError: the value is no string, or not UTF-8.
        """
        field = self.fields.get(key)
        if field is None:
            return None
        if field.type != GGUFValueType.STRING:
            raise InputError(f"{self.path}: metadata {key} is {field.type.name}; a string is needed")
        return _decode(self.data[field.start : field.start + field.size], f"metadata {key}", self.path)

    def integer(self, key: str) -> int | None:
        """Return an integer value of any width; None if the key is absent."""
        field = self.fields.get(key)
        if field is None:
            return None
        if field.type not in _INTEGERS:
            raise InputError(f"{self.path}: metadata {key} is {field.type.name}; one integer is needed")
        value: int = self._scalar(field)
        return value

    def float32(self, key: str) -> float | None:
        """Return a value that is stored as float32; None if the key is absent."""
        field = self.fields.get(key)
        if field is None:
            return None
        if field.type != GGUFValueType.FLOAT32:
            raise InputError(f"{self.path}: metadata {key} is {field.type.name}; FLOAT32 is needed")
        value: float = self._scalar(field)
        return value

    def bytes_of(self, tensor: str) -> memoryview:
        """Return a tensor's bytes, a view of the file."""
        info = self.tensors[tensor]
        return self.data[info.start : info.start + info.size]

    def _scalar(self, field: Field) -> Any:
        return _SCALARS[field.type].unpack_from(self.data, field.start)[0]

    def _alignment(self) -> int:
        alignment = self.integer("general.alignment")
        if alignment is None:
            return GGUF_DEFAULT_ALIGNMENT
        if alignment < 1 or alignment & (alignment - 1):
            raise InputError(f"{self.path}: general.alignment is {alignment}; it must be a power of two")
        return alignment


def _filled(file: BufferedReader, size: int) -> bytearray:
    """Read as many bytes as there still are, up to a number."""
    data = bytearray(size)
    del data[file.readinto(data) :]
    return data


def _mapped(file: BufferedReader, path: Path) -> mmap.mmap:
    if not os.fstat(file.fileno()).st_size:
        raise InputError(f"{path}: is empty")
    # A private copy-on-write mapping, because torch warns of views of read-only memory.
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class _Cursor:
    """A position in the file that never passes its end."""

    def __init__(self, path: Path, data: memoryview, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size  # of the file, of which data may be the beginning
        self.position = 0
        self.strings = 0  # in arrays, which are stepped over one by one

    def skip(self, count: int, what: str) -> int:
        """Step over ``count`` bytes; return where they start."""
        start, left = self.position, len(self.data) - self.position
        if count > left:
            raise InputError(
                f"{self.path}: {what} at byte {start} needs {count} bytes, but {left} are left; is the file complete?"
            )
        self.position += count
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.skip(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.skip(8, what))[0]
        return value

    def name(self, limit: int, what: str) -> str:
        length = self.u64(what)
        if length > limit:
            raise InputError(f"{self.path}: {what} has {length} bytes; at most {limit} are allowed")
        start = self.skip(length, what)
        name = _decode(self.data[start : start + length], what, self.path)
        if not name.isprintable():
            raise InputError(f"{self.path}: {what} at byte {start} is no printable text")
        return name


def _decode(data: memoryview, what: str, path: Path) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: {what} is not UTF-8") from None


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Return the numbers of tensors and of metadata fields."""
    magic = cursor.skip(4, "the magic number")
    if cursor.data[magic : magic + 4] != _MAGIC:
        hint = (
            "; name the adapter's directory, with its adapter_config.json"
            if cursor.path.suffix == ".safetensors"
            else ""
        )
        raise InputError(f"{cursor.path}: not a GGUF file{hint}")
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        reason = "big-endian files are not read" if version & 0xFFFF == 0 else "versions 2 and 3 are read"
        raise InputError(f"{cursor.path}: GGUF version {version}; {reason}")
    counts = cursor.u64("the number of tensors"), cursor.u64("the number of metadata fields")
    for count, what in zip(counts, ("tensors", "metadata fields"), strict=True):
        if count > _MOST_ENTRIES:
            raise InputError(f"{cursor.path}: claims {count} {what}; at most {_MOST_ENTRIES} are read")
    return counts


def _read_fields(cursor: _Cursor, count: int) -> Iterator[tuple[str, Field]]:
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.name(_LONGEST_KEY, "a metadata key")
        if key in seen:
            raise InputError(f"{cursor.path}: metadata {key} stands twice")
        seen.add(key)
        yield key, _read_value(cursor, f"metadata {key}")


def _read_value(cursor: _Cursor, what: str) -> Field:
    kind = _value_type(cursor, what)
    if kind == GGUFValueType.ARRAY:
        start = cursor.position
        _skip_array(cursor, what)
        return Field(kind, start, cursor.position - start)
    size = cursor.u64(what) if kind == GGUFValueType.STRING else _SCALARS[kind].size
    return Field(kind, cursor.skip(size, what), size)


def _skip_array(cursor: _Cursor, what: str) -> None:
    kind, length = _value_type(cursor, what), cursor.u64(what)
    if kind == GGUFValueType.ARRAY:
        raise InputError(f"{cursor.path}: {what} is an array of arrays, which GGUF readers do not support")
    if kind != GGUFValueType.STRING:
        cursor.skip(length * _SCALARS[kind].size, what)
        return
    cursor.strings += length
    if cursor.strings > _MOST_STRINGS:
        raise InputError(f"{cursor.path}: {what} makes more than {_MOST_STRINGS} texts in arrays; no model has as many")
    for _ in range(length):
        cursor.skip(cursor.u64(what), what)


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    raw = cursor.u32(what)
    try:
        return GGUFValueType(raw)
    except ValueError:
        raise InputError(f"{cursor.path}: {what} has the unknown type {raw}") from None


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> Iterator[tuple[str, TensorInfo]]:
    headers: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(count):
        name = cursor.name(_LONGEST_TENSOR_NAME, "a tensor name")
        if name in headers:
            raise InputError(f"{cursor.path}: tensor {name} stands twice")
        headers[name] = _read_shape(cursor, name), _read_type(cursor, name), cursor.u64(f"tensor {name}")
    data = expected = _padded(cursor.position, alignment)
    for name, (shape, kind, offset) in headers.items():
        if data + offset != expected:
            raise InputError(
                f"{cursor.path}: tensor {name} starts at byte {data + offset}, but the one before it ends at {expected}"
            )
        size = _size(cursor.path, name, shape, kind)
        if size > cursor.size - expected:
            raise InputError(
                f"{cursor.path}: tensor {name} of shape {list(shape)} ends behind the file's end; is the file complete?"
            )
        yield name, TensorInfo(shape, kind, expected, size)
        expected = _padded(expected + size, alignment)


def _read_shape(cursor: _Cursor, name: str) -> tuple[int, ...]:
    dimensions = cursor.u32(f"tensor {name}")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise InputError(f"{cursor.path}: tensor {name} has {dimensions} dimensions; 1 to 4 are possible")
    shape = tuple(cursor.u64(f"tensor {name}") for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise InputError(f"{cursor.path}: tensor {name} is empty: {list(shape)}")
    return shape


def _read_type(cursor: _Cursor, name: str) -> GGMLQuantizationType:
    raw = cursor.u32(f"tensor {name}")
    try:
        return GGMLQuantizationType(raw)
    except ValueError:
        raise InputError(f"{cursor.path}: tensor {name} has the unknown type {raw}") from None


def _size(path: Path, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise InputError(
            f"{path}: tensor {name} has rows of {shape[-1]} entries, no multiple of {kind.name}'s block of {block}"
        )
    return math.prod(shape) // block * size


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
