"""Files that are not quite GGUF LoRA files: each gives one error of ours, and takes no memory to speak of."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from struct import pack

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

import csulora
import factories
import gguf_files
from csulora.errors import CsuloraError, InputError, RefusedError

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
HUGE = (1 << 16) + 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1
EXTRA_BYTES = 32 << 20  # besides the file's own size, for tables of names and what torch takes for a reduction


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + pack("<I", kind) + payload


def string(key: str, value: str) -> bytes:
    return entry(key, GGUFValueType.STRING, text(value))


def array(key: str, kind: int, length: int, payload: bytes = b"") -> bytes:
    return entry(key, GGUFValueType.ARRAY, pack("<IQ", kind, length) + payload)


@dataclass(frozen=True)
class Tensor:
    """A tensor's header and data; ggml names the contiguous dimension first."""

    name: str | bytes
    dimensions: tuple[int, ...]
    data: bytes
    kind: int = F32
    offset: int | None = None
    count: int | None = None  # of dimensions, as claimed

    def header(self, offset: int) -> bytes:
        claimed = len(self.dimensions) if self.count is None else self.count
        dimensions = pack(f"<{len(self.dimensions)}Q", *self.dimensions)
        place = offset if self.offset is None else self.offset
        return text(self.name) + pack("<I", claimed) + dimensions + pack("<IQ", self.kind, place)


def ones(name: str, rows: int, columns: int, **rest: object) -> Tensor:
    return Tensor(name, (columns, rows), np.ones(rows * columns, np.float32).tobytes(), **rest)


A, B = ones("blk.0.attn_v.weight.lora_a", 2, 48), ones("blk.0.attn_v.weight.lora_b", 24, 2)
METADATA = {
    "general.architecture": string("general.architecture", "llama"),
    "general.type": string("general.type", "adapter"),
    "adapter.type": string("adapter.type", "lora"),
    "adapter.lora.alpha": entry("adapter.lora.alpha", GGUFValueType.FLOAT32, pack("<f", 4)),
}


@dataclass(frozen=True)
class File:
    """The parts of a file; as they stand, they are right."""

    metadata: dict[str, bytes] = field(default_factory=lambda: METADATA)
    tensors: tuple[Tensor, ...] = (A, B)
    magic: bytes = b"GGUF"
    version: bytes = pack("<I", 3)
    tensor_count: int | None = None
    field_count: int | None = None
    alignment: int = 32

    def padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)

    def encode(self) -> bytes:
        headers, data = b"", b""
        for tensor in self.tensors:
            headers += tensor.header(len(data))
            data = self.padded(data + tensor.data)
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        fields = len(self.metadata) if self.field_count is None else self.field_count
        counts = pack("<QQ", tensors, fields)
        preamble = self.magic + self.version + counts + b"".join(self.metadata.values()) + headers
        return self.padded(preamble) + data


VALID = File()


def with_field(key: str, value: bytes) -> File:
    return replace(VALID, metadata=METADATA | {key: value})


def without_field(key: str) -> File:
    return replace(VALID, metadata={name: value for name, value in METADATA.items() if name != key})


def with_tensors(*tensors: Tensor) -> File:
    return replace(VALID, tensors=tensors)


def scalar(kind: GGUFValueType) -> bytes:
    sizes = {"8": 1, "BOOL": 1, "16": 2, "32": 4, "64": 8}
    return bytes(next(size for end, size in sizes.items() if kind.name.endswith(end)))


def truncated() -> dict[str, bytes]:
    # The padding behind the last tensor may be missing.
    whole = VALID.encode()
    cuts = np.unique(np.linspace(0, len(whole) - 1, 90, dtype=int))
    return {f"truncated at {cut}": whole[:cut] for cut in cuts.tolist()}


def preambles() -> dict[str, File]:
    return {
        "magic": replace(VALID, magic=b"GGML"),
        "big-endian": replace(VALID, version=pack(">I", 3)),
        **{f"version {version}": replace(VALID, version=pack("<I", version)) for version in (0, 1, 4, 2**31)},
        **{f"{count} tensors": replace(VALID, tensor_count=count) for count in (0, 1, 3, 40, *HUGE)},
        **{f"{count} fields": replace(VALID, field_count=count) for count in (0, 1, 3, 5, 40, *HUGE)},
    }


def metadata() -> dict[str, File]:
    alpha, kinds = "adapter.lora.alpha", [kind for kind in GGUFValueType if kind not in (8, 9)]
    not_strings = {
        f"{key} is {kind.name}": with_field(key, entry(key, kind, scalar(kind)))
        for key in ("general.architecture", "general.type", "adapter.type")
        for kind in (GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL)
    }
    return {
        **{
            f"alpha is {kind.name}": with_field(alpha, entry(alpha, kind, scalar(kind)))
            for kind in kinds
            if kind != GGUFValueType.FLOAT32
        },
        "alpha is a string": with_field(alpha, string(alpha, "4")),
        "alpha is an array": with_field(alpha, array(alpha, GGUFValueType.FLOAT32, 1, pack("<f", 4))),
        **{
            f"alpha is {value}": with_field(alpha, entry(alpha, GGUFValueType.FLOAT32, pack("<f", value)))
            for value in (float("nan"), float("inf"), float("-inf"))
        },
        **not_strings,
        **{f"no {key}": without_field(key) for key in ("general.architecture", "general.type", "adapter.type")},
        "general.type is model": with_field("general.type", string("general.type", "model")),
        "adapter.type is other": with_field("adapter.type", string("adapter.type", "control_vector")),
        **{
            f"architecture {name!r}": with_field("general.architecture", string("general.architecture", name))
            for name in ("", "Llama", "llama4", "qwen2moe", "mamba", "gemma3n", "phi2", "x" * 5000)
        },
        "architecture is not UTF-8": with_field(
            "general.architecture", entry("general.architecture", GGUFValueType.STRING, text(b"\xff\xfe\xfd"))
        ),
        "aLoRA": with_field("x", array("adapter.alora.invocation_tokens", GGUFValueType.UINT32, 2, pack("<II", 1, 2))),
        **{
            f"unknown field {key}": with_field("x", string(key, "1"))
            for key in ("adapter.lora.scale", "adapter.dora", "llama.rope.freq_base", "magic", "")
        },
        "field twice": with_field("x", string("general.name", "a") + string("general.name", "b")),
        "alpha twice": with_field("x", METADATA[alpha]),
        "key that breaks the line": with_field("x", string("general.x\ny", "1")),
        "key is not UTF-8": with_field("x", entry(b"general.\xff", GGUFValueType.BOOL, b"\1")),
        **{f"value of type {kind}": with_field("x", entry("general.x", kind, bytes(8))) for kind in (13, 255, 2**31)},
        **{f"key of {size} bytes": with_field("x", pack("<Q", size) + b"general.x") for size in HUGE},
        **{
            f"string of {size} bytes": with_field("x", entry("general.x", GGUFValueType.STRING, pack("<Q", size)))
            for size in HUGE
        },
        **{
            f"array of {size} {kind.name}": with_field("x", array("general.x", kind, size))
            for size in HUGE
            for kind in (GGUFValueType.UINT8, GGUFValueType.FLOAT64, GGUFValueType.STRING)
        },
        "array of arrays": with_field("x", array("general.x", GGUFValueType.ARRAY, 1, pack("<IQ", 0, 0))),
        "array of an unknown type": with_field("x", array("general.x", 99, 1, bytes(8))),
        **{
            f"alignment {value}": with_field("x", entry("general.alignment", GGUFValueType.UINT32, pack("<I", value)))
            for value in (0, 3, 48, 2**31)
        },
        "alignment is a string": with_field("x", string("general.alignment", "32")),
    }


def not_finite() -> dict[str, File]:
    files = {}
    for kind, bits in ((F32, "<u4"), (F16, "<u2"), (BF16, "<u2")):
        one = {F32: 0x3F800000, F16: 0x3C00, BF16: 0x3F80}[kind]
        infinity = {F32: 0x7F800000, F16: 0x7C00, BF16: 0x7F80}[kind]
        for name, value in (
            ("NaN", infinity + 1),
            ("inf", infinity),
            ("-inf", infinity | 1 << (31 if kind == F32 else 15)),
        ):
            for wrong in range(2):
                tensors = []
                for i, tensor in enumerate((A, B)):
                    data = np.full(tensor.dimensions[0] * tensor.dimensions[1], one, bits)
                    if i == wrong:
                        data[-1] = value
                    tensors.append(replace(tensor, kind=kind, data=data.tobytes()))
                files[f"{name} in {'AB'[wrong]}, {kind.name}"] = with_tensors(*tensors)
    return files


def tensors() -> dict[str, File]:
    down = "blk.0.ffn_down.weight"
    return {
        "no tensor": with_tensors(),
        "no A": with_tensors(B),
        "no B": with_tensors(A),
        "a second module without B": with_tensors(A, B, ones(f"{down}.lora_a", 2, 64)),
        "tensor twice": with_tensors(A, B, B),
        **{
            f"tensor {name}": with_tensors(A, B, ones(name, 2, 48))
            for name in (
                "blk.0.attn_v.weight",
                "blk.0.attn_v.lora_a",
                "blk.0.attn_v.weight.lora_c",
                "blk.0.attn_v.bias.lora_a",
                "blk.0.attn_norm.weight",
                "output_norm.weight",
                "blk.0.attn_norm.weight.lora_a",
                "blk.00.attn_v.weight.lora_a",
                "blk.-1.attn_v.weight.lora_a",
                "blk.99999.attn_v.weight.lora_a",
                "blk.0.ffn_up_exps.weight.lora_a",
                "model.layers.0.self_attn.v_proj.lora_A.weight",
                "rope_freqs.weight",
                "lora_a",
                "",
                "x" * 63,
                "x" * 64,
            )
        },
        "name is not UTF-8": with_tensors(A, B, Tensor(b"\xff", (48, 2), bytes(384))),
        "layer that is not there": with_tensors(*(replace(t, name=t.name.replace("0", "7")) for t in (A, B))),
        "unlike ranks": with_tensors(A, ones("blk.0.attn_v.weight.lora_b", 24, 3)),
        "another input width": with_tensors(ones("blk.0.attn_v.weight.lora_a", 2, 47), B),
        "another output width": with_tensors(A, ones("blk.0.attn_v.weight.lora_b", 25, 2)),
        "transposed": with_tensors(
            ones("blk.0.attn_v.weight.lora_a", 48, 2), ones("blk.0.attn_v.weight.lora_b", 2, 24)
        ),
        **{
            f"{kind.name} factor": with_tensors(replace(A, kind=kind, dimensions=(256, 2), data=bytes(4096)), B)
            for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K, GGMLQuantizationType.F64)
        },
        **{
            f"{kind.name} factor": with_tensors(replace(A, kind=kind), B)
            for kind in (GGMLQuantizationType.I8, GGMLQuantizationType.I32)
        },
        "rows that are no whole blocks": with_tensors(replace(A, kind=GGMLQuantizationType.Q8_0), B),
        **{f"tensor of type {kind}": with_tensors(replace(A, kind=kind), B) for kind in (4, 99, 2**32 - 1)},
        "B in one dimension": with_tensors(A, replace(B, dimensions=(48,))),
        "three dimensions": with_tensors(replace(A, dimensions=(48, 1, 2)), B),
        "four dimensions": with_tensors(replace(A, dimensions=(48, 1, 2, 1)), B),
        **{
            f"{count} dimensions claimed": with_tensors(replace(A, count=count), B) for count in (0, 1, 3, 5, 2**32 - 1)
        },
        **{f"dimensions {pair}": with_tensors(replace(A, dimensions=pair), B) for pair in ((0, 2), (48, 0), (0, 0))},
        **{f"{size} columns": with_tensors(replace(A, dimensions=(size, 2)), B) for size in HUGE},
        **{f"{size} rows": with_tensors(replace(A, dimensions=(48, size)), B) for size in HUGE},
        "size that overflows 64 bits": with_tensors(replace(A, dimensions=(1 << 62, 1 << 62)), B),
        "size that wraps to what is there": with_tensors(replace(A, dimensions=((1 << 63) + 48, 2)), B),
        **{f"offset {offset}": with_tensors(A, replace(B, offset=offset)) for offset in (0, 1, 383, 416, *HUGE)},
        "offset of the first": with_tensors(replace(A, offset=32), B),
    }


def cases() -> dict[str, bytes]:
    groups: tuple[Callable[[], dict[str, File]], ...] = (preambles, metadata, not_finite, tensors)
    built = {name: file.encode() for group in groups for name, file in group().items()}
    return truncated() | built | {"text": b"GGUF is a file format", "nothing but zeros": bytes(4096)}


CASES = cases()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save_model(tmp_path_factory.mktemp("model") / "model.gguf", factories.llama_weights())


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 200
    assert len(set(CASES.values())) == len(CASES)


def test_the_starting_point_is_valid(model: Path, tmp_path: Path) -> None:
    """So each case differs from a valid file by what its name says."""
    path = tmp_path / "lora.gguf"
    path.write_bytes(VALID.encode())
    assert csulora.load_adapter(path, model).modules["model.layers.0.self_attn.v_proj"].scale == 2
    assert len(GGUFReader(path).tensors) == 2


@pytest.mark.parametrize("name", CASES)
def test_one_error(name: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.gguf"
    path.write_bytes(CASES[name])
    with pytest.raises((InputError, RefusedError)) as caught:
        csulora.load_adapter(path, model)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, len(VALID.encode()) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_give_no_other_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(VALID.encode())
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(data)
    with suppress(CsuloraError):
        csulora.load_adapter(path)


_LOAD_ALL = """
import sys
from pathlib import Path
import csulora

def peak():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) << 10

model, valid, *files = map(Path, sys.argv[1:])
csulora.load_adapter(valid, model)
Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is that of what follows
start = peak()
for file in files:
    try:
        csulora.load_adapter(file, model)
    except csulora.CsuloraError:
        pass
    else:
        sys.exit(f"{file} was accepted")
print(peak() - start)
"""


def test_texts_in_arrays_are_counted_before_they_are_stepped_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csulora.models.gguf_file._MOST_STRINGS", 10)
    for count in (5, 6):
        fields = with_field("x", array("general.x", GGUFValueType.STRING, 5, bytes(40)))
        more = entry("general.y", GGUFValueType.ARRAY, pack("<IQ", GGUFValueType.STRING, count) + bytes(8 * count))
        path = tmp_path / f"{count}.gguf"
        path.write_bytes(replace(fields, metadata=fields.metadata | {"y": more}).encode())
        if count == 5:
            csulora.load_adapter(path, model)
        else:
            with pytest.raises(InputError, match="more than 10 texts"):
                csulora.load_adapter(path, model)


def large_files() -> dict[str, bytes]:
    """Some MiB each, made so that an object per element would take gigabytes."""
    count = 32 << 20
    bytes_array = with_field("x", array("general.x", GGUFValueType.UINT8, count, bytes(count)))
    empty_strings = with_field("x", array("general.x", GGUFValueType.STRING, count // 8, bytes(count)))
    many_fields = replace(
        VALID, metadata=METADATA | {str(i): entry(f"general.{i}", GGUFValueType.BOOL, b"\1") for i in range(65_000)}
    )
    wide = ones("blk.0.attn_v.weight.lora_a", 2, count // 8)
    files = {"bytes": bytes_array, "strings": empty_strings, "fields": many_fields, "wide": with_tensors(wide, B)}
    # Every one is refused at last, so that all of it was looked at.
    return {name: replace(file, tensors=(*file.tensors[:1],)).encode() for name, file in files.items()}


def test_memory_is_bounded(model: Path, tmp_path: Path) -> None:
    valid = tmp_path / "valid.gguf"
    valid.write_bytes(VALID.encode())
    paths = []
    for i, data in enumerate([*CASES.values(), *large_files().values()]):
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(data)
    largest = max(path.stat().st_size for path in paths)
    command = [sys.executable, "-c", _LOAD_ALL, str(model), str(valid), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"{len(paths)} files of up to {largest >> 20} MiB: {int(done.stdout) >> 20} MiB more than for a valid one")
    assert int(done.stdout) <= largest + EXTRA_BYTES
