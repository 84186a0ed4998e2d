"""The base model that a GGUF LoRA file must fit: its architecture, head counts and weight matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from csulora.errors import InputError, RefusedError
from csulora.io.files import to_json
from csulora.io.hub import local_path
from csulora.models import gguf_directory, gguf_experts, gguf_layout, gguf_parts, names
from csulora.models.experts import ExpertPart
from csulora.models.gguf_directory import MOST_LAYERS, read_counts
from csulora.models.gguf_file import GGUFFile
from csulora.models.gguf_layout import HEAD, Architecture
from csulora.models.gguf_orders import Order

_WITH_SCALES = frozenset({GGMLQuantizationType.NVFP4})  # whose weights have a further scale for each expert


@dataclass(frozen=True)
class BaseModel:
    """What is needed of a base model to write and to read GGUF LoRA files for it.

    Attributes:
        path: where it was read from.
        architecture: how llama.cpp lays it out.
        counts: what the orders of its rows and columns follow from, see `Architecture.counts`.
        shapes: (out, in) of every weight matrix that llama.cpp has a name for, by module. Without the output
            head if that is the token embedding.
        name: what the model calls itself.
        license: its licence, if it says so.
        multipliers: what updates in GGUF files are multiplied by, by module, where its architecture has such factors.
        fuses_experts: its GGUF file keeps gate and up of experts in one tensor.
        spreads_rows: its GGUF file spreads modules over tensors as `Architecture.spread` says; converters of 2025 kept
            them whole, in Hugging Face's order.
    """

    path: Path
    architecture: Architecture
    counts: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    name: str
    license: str | None = None
    multipliers: dict[str, float] = field(default_factory=dict)
    fuses_experts: bool = False
    spreads_rows: bool = True

    def __post_init__(self) -> None:
        """Check that rows and columns can be reordered head by head."""
        for module in self.shapes:
            self._orders(module)

    @classmethod
    def open(cls, source: str | Path) -> BaseModel:
        """Read a GGUF file's header, or ``config.json`` in a Hugging Face model directory or repository.

        Of a GGUF model in several files, the first is named and the others lie beside it.

        Raises:
            InputError: neither is there, or it is malformed.
            RefusedError: the architecture is not supported.
        """
        path = local_path(source, ["config.json", "README.md"])
        if not path.is_dir():
            return cls.of_files(gguf_parts.open_parts(path))
        found = gguf_directory.describe(path)
        name = Path(source).resolve().name
        return cls(
            path,
            found.architecture,
            found.counts,
            found.shapes,
            name,
            found.license,
            found.multipliers,
            found.architecture.fuses_experts,
        )

    @classmethod
    def of_files(cls, files: Sequence[GGUFFile]) -> BaseModel:
        """Describe the model in an open GGUF file, or in all of its parts."""
        file = files[0]
        _check_model_file(file, len(files))
        architecture = gguf_layout.architecture(file.text("general.architecture"), str(file.path))
        _check_file_tells_all(file, architecture)
        counts = read_counts(
            architecture, str(file.path), lambda source: f"{architecture.name}.{source.metadata}", file.integer
        )
        shapes = _shapes(files, architecture)
        fused = gguf_experts.is_fused([tensor for part in files for tensor in part.tensors])
        name = file.text("general.name") or file.path.stem
        licence = file.text("general.license")
        multipliers = _expert_scales(files, architecture)
        spread = not any(
            f"{architecture.tensor_name(module)}{names.WEIGHT}" in part.tensors
            for module in shapes
            if architecture.spread_of(module)
            for part in files
        )
        base = cls(file.path, architecture, counts, shapes, name, licence, multipliers, fused, spread)
        base._check_heights(files)
        return base

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the token embedding."""
        return HEAD not in self.shapes

    @property
    def identity(self) -> str:
        """Hex sha256 over all that a LoRA file for this model depends on."""
        document = {
            "architecture": self.architecture.name,
            "counts": self.counts,
            "shapes": self.shapes,
            "name": self.name,
            "license": self.license,
            "multipliers": self.multipliers,
            "fuses_experts": self.fuses_experts,
            "spreads_rows": self.spreads_rows,
        }
        return hashlib.sha256(to_json(document).encode()).hexdigest()

    @cached_property
    def number_of_experts(self) -> dict[str, int]:
        """How many experts there are in each tensor that holds them, by its GGUF name less ``.weight``."""
        numbers: dict[str, set[int]] = {}
        for module in self.shapes:
            if names.is_expert(module) and (tensor := self.expert_tensor(module)):
                numbers.setdefault(tensor, set()).add(gguf_experts.number(module))
        return {tensor: len(found) for tensor, found in numbers.items()}

    def expert_tensor(self, module: str) -> str | None:
        """Return the GGUF name, less ``.weight``, of the tensor that holds an expert's projection; None for others."""
        return gguf_experts.tensor_name(module, self.architecture.experts, fused=self.fuses_experts)

    def heights(self, module: str) -> dict[str, int]:
        """Return how many of a module's rows each tensor holds, in their order, by its GGUF name less ``.weight``.

        Empty if llama.cpp has no such weight matrix.
        """
        spread, rows = self.architecture.spread_of(module), self.shapes[module][0]
        if spread and self.spreads_rows:
            return dict(zip(spread.tensors, spread.heights(self.counts, rows), strict=True))
        tensor = self.expert_tensor(module) or self.architecture.tensor_name(module)
        return {tensor: rows} if tensor else {}

    def to_gguf(self, module: str, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the rows of ``b`` and the columns of ``a``, factors of a module's update, in llama.cpp's orders."""
        rows, columns = self._orders(module)
        return (b if rows is None else b[rows]), (a if columns is None else a[:, columns])

    def from_gguf(self, module: str, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo `to_gguf`."""
        rows, columns = self._orders(module)
        return (b if rows is None else b[rows.argsort()]), (a if columns is None else a[:, columns.argsort()])

    def weight_from_gguf(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Put rows and columns of a module's weight in Hugging Face's orders."""
        rows, columns = self._orders(module)
        weight = weight if rows is None else weight[rows.argsort()]
        return weight if columns is None else weight[:, columns.argsort()]

    def _orders(self, module: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rows, columns = self.shapes[module]
        is_whole = self.architecture.spread_of(module) and not self.spreads_rows
        return (
            self._order(module, None if is_whole else self.architecture.row_order(module), rows),
            self._order(module, self.architecture.column_order(module), columns),
        )

    def _check_heights(self, files: Sequence[GGUFFile]) -> None:
        """Raise `InputError` unless tensors over which a module is spread are there, of the shapes that they need."""
        shapes = {tensor: info.shape for file in files for tensor, info in file.tensors.items()}
        for module in filter(self.architecture.spread_of, self.shapes):
            needed = self.heights(module)
            found = {tensor: shapes.get(f"{tensor}{names.WEIGHT}", (0,))[0] for tensor in needed}
            if found != needed:
                raise InputError(
                    f"{self.path}: {module} is spread over {_listed(found)}, and {_listed(needed)} are needed; "
                    "the file is damaged, convert the model again"
                )
            wide = {shapes[f"{tensor}{names.WEIGHT}"][1:] for tensor in needed}
            if wide != {self.shapes[module][1:]}:
                raise InputError(
                    f"{self.path}: {' and '.join(needed)} hold rows of {module}, and theirs have unlike lengths; "
                    "the file is damaged, convert the model again"
                )

    def _order(self, module: str, order: Order | None, size: int) -> torch.Tensor | None:
        try:
            return None if order is None else order(self.counts, size)
        except ValueError as error:
            raise InputError(f"{self.path}: {module} has {error}") from None


def _listed(heights: Mapping[str, int]) -> str:
    return " and ".join(f"{tensor} of {rows} rows" for tensor, rows in heights.items())


def _check_model_file(file: GGUFFile, parts: int) -> None:
    kind = file.text("general.type")
    if kind not in (None, "model"):
        raise InputError(f"{file.path}: general.type is {kind!r}; a model is needed")
    if (file.integer("split.count") or 1) != parts:
        raise RefusedError(f"{file.path}: one part of several; join them with llama-gguf-split --merge first")


def _shapes(files: Sequence[GGUFFile], architecture: Architecture) -> dict[str, tuple[int, int]]:
    shapes = {module: part.shape for module, part in expert_parts(files, architecture)}
    for tensor, info in (named for file in files for named in file.tensors.items()):
        module = architecture.module_name(tensor.removesuffix(names.WEIGHT))
        if not module or not tensor.endswith(names.WEIGHT):
            continue
        if len(info.shape) == 2:
            before = shapes.get(module, (0, 0))[0] if architecture.spread_of(module) else 0
            shapes[module] = (before + info.shape[0], info.shape[1])
        elif len(info.shape) == 1 and module.endswith(gguf_layout.SHARED_EXPERT_GATE):
            shapes[module] = (1, info.shape[0])
    layers = _layers(files[0], architecture)
    return {module: shape for module, shape in shapes.items() if (gguf_layout.layer_of(module) or 0) < layers}


def expert_parts(files: Sequence[GGUFFile], architecture: Architecture) -> Iterator[tuple[str, ExpertPart]]:
    """Yield every expert's projections by module, and where they lie in these files."""
    for file, tensor, info in ((part, *named) for part in files for named in part.tensors.items()):
        held = gguf_experts.stack(tensor.removesuffix(names.WEIGHT), architecture.experts)
        if held and tensor.endswith(names.WEIGHT) and len(info.shape) == 3:
            yield from gguf_experts.parts(tensor, held, info.shape, str(file.path))


def _expert_scales(files: Sequence[GGUFFile], architecture: Architecture) -> dict[str, float]:
    """Return what the outputs of experts are multiplied by before an update is added to them, by module."""
    found: dict[str, float] = {}
    if not architecture.expert_scales:
        return found
    for file, tensor in ((part, tensor) for part in files for tensor in part.tensors):
        if (layer := gguf_experts.layer_of_scales(tensor)) is None:
            continue
        weights = file.tensors.get(tensor.replace(".scale", ".weight"))
        if file.tensors[tensor].type != GGMLQuantizationType.F32 or weights is None or weights.type in _WITH_SCALES:
            raise RefusedError(
                f"{file.path}: {tensor} also holds scales of quantised weights; name the Hugging Face directory instead"
            )
        scales = torch.frombuffer(file.bytes_of(tensor), dtype=torch.float32)
        found |= gguf_experts.multipliers(layer, architecture.experts, scales, f"{file.path}: {tensor}")
    return found


def _check_file_tells_all(file: GGUFFile, architecture: Architecture) -> None:
    """Raise if the order of rows, or a factor of the weights, does not follow from the file."""
    if architecture.unlike and f"{architecture.name}.{architecture.unlike}" in file.fields:
        raise RefusedError(
            f"{file.path}: a {architecture.name} model with {architecture.unlike}, which also sees; "
            "the order of its rows is not supported"
        )
    if architecture.multipliers:
        raise RefusedError(
            f"{file.path}: weights of {architecture.name} models are multiplied by factors of the configuration, "
            "which the file does not state; name the Hugging Face directory instead"
        )


def _layers(file: GGUFFile, architecture: Architecture) -> int:
    """How many layers are run; the last ones may be there to predict further tokens."""
    layers = file.integer(f"{architecture.name}.block_count")
    if layers is None:
        return MOST_LAYERS
    return layers - (file.integer(f"{architecture.name}.nextn_predict_layers") or 0)
