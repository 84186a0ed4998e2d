"""The in-memory form of a LoRA adapter, and one module per file format that reads it and writes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

REPORT_FILE = "csulora_report.json"  # beside the weights of a corrected adapter
SIGNATURE_FILE = "model.sig"  # of a directory, over all other files in it; model-signing's own name for it
STATEMENT_FILE = "csulora.intoto.jsonl"  # what a signed directory was made of
CORRECTED_SHA256 = "corrected_sha256"  # field of a written report: the content that lies beside it

Format = Literal["peft", "mlx", "gguf"]

_AT_ONCE = 1 << 20  # numbers whose magnitudes are in memory at a time

# Type -> the whole numbers of its size, which of their bits are the magnitude, and that of infinity; NaN's is larger.
_LAYOUTS = {
    torch.float16: (torch.int16, np.int16(0x7FFF), 0x7C00),
    torch.bfloat16: (torch.int16, np.int16(0x7FFF), 0x7F80),
    torch.float32: (torch.int32, np.int32(0x7FFFFFFF), 0x7F800000),
    torch.float64: (torch.int64, np.int64(0x7FFFFFFFFFFFFFFF), 0x7FF0000000000000),
}


@dataclass(frozen=True)
class LoraModule:
    """The update of one weight matrix, ``dW = scale * b @ a``, oriented (out, in) like ``torch.nn.Linear.weight``.

    An embedding's weight is (vocabulary, width), so there ``b`` is (vocabulary, r) and ``a`` is (r, width).

    >>> module = csulora.LoraModule(torch.ones(6, 2), torch.ones(2, 4), scale=0.5)
    >>> module.shape, module.rank
    ((6, 4), 2)
    """

    b: torch.Tensor  # (out, r), float16, bfloat16 or float32
    a: torch.Tensor  # (r, in), the same dtype
    scale: float = 1.0
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Number of columns of ``b``."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight matrix that the update is added to."""
        return self.b.shape[0], self.a.shape[1]

    def folded(self) -> LoraModule:
        """Return the same update with scale 1: ``b`` takes the scale, rounded once to its storage type."""
        if self.scale == 1:
            return self
        return replace(self, b=(self.b.double() * self.scale).to(self.b.dtype), scale=1.0)

    def padded(self, rank: int) -> LoraModule:
        """Return the same update with as many columns of ``b``, the further ones zero."""
        missing = rank - self.rank
        if not missing:
            return self
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], missing)], dim=1)
        return replace(self, b=b, a=torch.cat([self.a, self.a.new_zeros(missing, self.a.shape[1])]))


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: one `LoraModule` per module, under the name the module has in the host's model.

    Tensors keep their storage type. ``config`` holds what csulora knows of the adapter's own configuration, by
    the names of PEFT's ``adapter_config.json``; nothing in it changes the update beyond what ``modules`` already says.
    ``documents`` are texts to be written beside the weights, by file name. ``partial`` says that modules were left
    out on purpose, so that ``config`` may target more than there is. ``copies`` are base matrices that the file holds
    besides, by module; `correct` compares them with the aligned checkpoint's and leaves them out. ``format`` is the one
    it was read in, and is written in unless another is asked for. ``is_decoded`` says that fused experts have been
    taken apart, see `experts.decoded`. ``names_in_peft`` are what PEFT calls modules that mlx-lm calls otherwise.
    ``sha256`` is of a GGUF file its own; of a directory that of a text with a line for each of ``files``, which holds
    the file's sha256 in hex. ``files`` are those that were read, name -> sha256, first the configuration.

    >>> csulora.load_adapter(adapter).config["r"]
    8
    """

    obtained_by: ClassVar[str] = "csulora.load_adapter(path)"

    modules: dict[str, LoraModule]
    config: dict[str, Any]
    path: Path
    sha256: str
    documents: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    format: Format = "peft"
    is_decoded: bool = False
    names_in_peft: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


class TextsOnDemand(Mapping[str, str]):
    """Texts by name, made whenever one is asked for: a server that corrects on load never asks."""

    def __init__(self, makers: Mapping[str, Callable[[], str]]) -> None:
        """Keep what makes each text."""
        self._makers = makers

    def __getitem__(self, name: str) -> str:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def alike(updates: Sequence[LoraModule]) -> list[LoraModule]:
    """Return the same updates in one type and of one scale.

    It is the largest scale: what a ``b`` of another takes over makes it smaller, so that all stay within their type.
    """
    dtype = reduce(torch.promote_types, (update.b.dtype for update in updates))
    scale = max((update.scale for update in updates), key=abs)
    return [
        replace(
            update,
            b=(update.b if update.scale == scale else update.b.double() * (update.scale / scale)).to(dtype),
            a=update.a.to(dtype),
            scale=scale,
        )
        for update in updates
    ]


def stacked(placed: Sequence[tuple[slice, LoraModule]], rows: int) -> LoraModule:
    """Return the update of a matrix of so many rows from those of some of its rows; the other rows' update is zero.

    Updates with equal A keep their rank; the ranks of others add up.

    >>> gate, up = (LoraModule(torch.ones(2, 1), torch.tensor([[number, 0.0]])) for number in (1.0, 2.0))
    >>> stacked([(slice(0, 2), gate), (slice(2, 4), up)], rows=5).b.tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    """
    places, updates = zip(*placed, strict=True)
    found = alike(updates)
    first = found[0]
    shared = all(torch.equal(first.a, update.a) for update in found)
    b = first.b.new_zeros(rows, first.rank if shared else sum(update.rank for update in found))
    column = 0
    for place, update in zip(places, found, strict=True):
        b[place, column : column + update.rank] = update.b
        column += 0 if shared else update.rank
    return LoraModule(b, first.a if shared else torch.cat([update.a for update in found]), first.scale)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor, which is not empty, holds neither NaN nor infinity.

    On the CPU it is read as whole numbers, by this thread alone. torch's functions share even small tensors among
    threads that wait for one another by spinning: on a busy machine an adapter then takes seconds.
    """
    layout = _LAYOUTS.get(tensor.dtype)
    if layout is None or tensor.device.type != "cpu":
        low, high = tensor.aminmax()
        return math.isfinite(low.item()) and math.isfinite(high.item())
    numbers, magnitude, infinity = layout
    bits = tensor.detach().resolve_neg().view(numbers).numpy()
    if bits.size <= _AT_ONCE:
        return bool((bits & magnitude).max() < infinity)
    step = max(1, _AT_ONCE // bits[0].size)
    parts = (bits[start : start + step] for start in range(0, len(bits), step))
    return all((part & magnitude).max() < infinity for part in parts)


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors on one device have the same type, shape and bits; read as by `is_finite`."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    layout = _LAYOUTS.get(one.dtype)
    if layout is None or one.device.type != "cpu":
        return torch.equal(one, other)
    bits, others = (tensor.detach().view(layout[0]).numpy() for tensor in (one, other))
    return np.array_equal(bits, others)
