"""How the 2-D weights of a checkpoint directory are stored, and their values: floating point, FP8 or MXFP4."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from csulora.errors import InputError
from csulora.models import experts, names, quantisation, scaled_codes
from csulora.models.experts import ExpertPart
from csulora.models.rounding import RoundingVariances
from csulora.models.scaled_codes import Block
from csulora.models.shards import StoredTensor
from csulora.subspace.expert_layout import ExpertLayout

FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_FP8, _MXFP4 = "F8_E4M3", "MXFP4_BLOCKS"  # the second is no type of safetensors, nor of ggml, which has another MXFP4
SCALED = {_FP8: scaled_codes.FP8, _MXFP4: scaled_codes.MXFP4}

_HASHED_AT_ONCE = 4 << 20  # bytes

_BLOCKS = "_blocks"
_SCALES_OF_BLOCKS = "_scales"
_SCALES = ("_scale_inv", "_scale")  # both are multiplied with
_OFFSETS = "_zero_point"
_SCALE_DTYPES = (*FLOATING, "F8_E8M0", "U8")


@dataclass(frozen=True)
class Scales:
    """Where a matrix's scales lie, one for each block of its stored form."""

    file: Path
    tensor: str
    grid: tuple[int, int]
    block: Block


@dataclass(frozen=True)
class Weight:
    """Where a 2-D weight lies and what it looks like, oriented (out, in)."""

    file: Path
    tensor: str
    shape: tuple[int, int]
    dtype: str  # as safetensors or ggml calls it, or MXFP4_BLOCKS
    transposed: bool  # stored as (in, out)
    scales: Scales | None = None
    part: ExpertPart | None = None  # of a tensor that holds all experts


@dataclass(frozen=True)
class Contents:
    """The 2-D weights of a directory by module, those of experts among them, and the shapes of its other tensors."""

    weights: dict[str, Weight]
    others: dict[str, list[int]]

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, StoredTensor],
        config: Mapping[str, Any],
        directory: Path,
        layout: ExpertLayout,
    ) -> Contents:
        """Tell weights from scales; ``layout`` is that of the model's experts.

        Raises:
            InputError: the weights are quantised in a way that csulora does not read, or scales do not fit.
        """
        config_file = directory / "config.json"
        settings = quantisation.settings_of(config, config_file)
        quantisation.check_readable(settings, tensors, directory)
        stored = {name: tensor for name, tensor in tensors.items() if not _is_companion(name, tensors)}
        logical = {_logical(name, tensor): (name, _logical_shape(name, tensor)) for name, tensor in stored.items()}
        if len(logical) < len(stored):
            twice = next(name for name in stored if logical[_logical(name, stored[name])][0] != name)
            raise InputError(f"{stored[twice].file}: {twice} is a weight that another tensor holds as well")
        matrices = {
            name.removesuffix(names.WEIGHT): shape
            for name, (_, shape) in logical.items()
            if name.endswith(names.WEIGHT) and len(shape) == 2
        }
        transposed = names.conv1d(matrices)
        weights: dict[str, Weight] = {}
        for module, (rows, columns) in matrices.items():
            tensor, _ = logical[f"{module}{names.WEIGHT}"]
            scales = _scales_of(tensor, (rows, columns), tensors, settings, config_file)
            turned = module in transposed
            shape = (columns, rows) if turned else (rows, columns)
            dtype = _MXFP4 if tensor.endswith(_BLOCKS) else tensors[tensor].dtype
            weights[module] = Weight(tensors[tensor].file, tensor, shape, dtype, turned, scales)
        bare = {name.removesuffix(names.WEIGHT): (tensor, shape) for name, (tensor, shape) in logical.items()}
        split = dict(experts.parts({name: shape for name, (_, shape) in bare.items()}, layout))
        scales_of_stack: dict[str, Scales | None] = {}
        for module, part in split.items():
            tensor, (count, rows, columns) = bare[part.tensor]
            if tensor not in scales_of_stack:
                scales_of_stack[tensor] = _scales_of(tensor, (rows, columns), tensors, settings, config_file, count)
            dtype = _MXFP4 if tensor.endswith(_BLOCKS) else tensors[tensor].dtype
            weights[module] = Weight(
                tensors[tensor].file, tensor, part.shape, dtype, part.transposed, scales_of_stack[tensor], part
            )
        stacks = {part.tensor for part in split.values()}
        others = {name: shape for name, (_, shape) in bare.items() if name not in weights and name not in stacks}
        return cls(weights, others)


def logical_shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, list[int]]:
    """Return the shapes of weights by name less ``.weight``; those that are kept in blocks have their own."""
    return {
        _logical(name, tensor).removesuffix(names.WEIGHT): _logical_shape(name, tensor)
        for name, tensor in tensors.items()
        if name.endswith(names.WEIGHT) or _logical(name, tensor) != name or len(tensor.shape) == 3
    }


def load(weight: Weight) -> tuple[torch.Tensor, str]:
    """Return a weight, (out, in), and the hex sha256 of its bytes as they are stored, its scales' after its own.

    A matrix of floating-point numbers is a view of the mapped file, in its storage type. Others are float32.

    Raises:
        InputError: the file cannot be read, a scale is not a positive number, or an entry is not finite.
    """
    if weight.part is not None:
        return _load_part(weight, weight.part)
    digest = hashlib.sha256()
    for file, tensor in _parts(weight):
        _update(digest, file, tensor)
    stored = read(weight.file, weight.tensor)
    if weight.scales is not None:
        stored = scaled_codes.dequantise(*_scaled(weight, weight.scales))
        _check_finite(stored, weight)
    return stored.t() if weight.transposed else stored, digest.hexdigest()


def _load_part(weight: Weight, part: ExpertPart) -> tuple[torch.Tensor, str]:
    """Return an expert's projection; what is floating point is hashed as a file of single experts would store it."""
    if weight.scales is None:
        stored = read(weight.file, weight.tensor, part.expert)
        matrix = (stored.t() if part.transposed else stored)[part.rows].contiguous()
        return matrix, hashlib.sha256(_bytes_of(matrix)).hexdigest()
    codes, scales, block, code_format = _scaled(weight, weight.scales)
    matrix = scaled_codes.dequantise(codes, scales, block, code_format)
    digest = hashlib.sha256(_bytes_of(codes))
    digest.update(_bytes_of(scales))
    _check_finite(matrix, weight)
    return matrix.t() if part.transposed else matrix, digest.hexdigest()


def rounding_variances(weight: Weight) -> RoundingVariances | None:
    """Return how far storage may have moved a weight's entries; None if its dtype tells."""
    if weight.scales is None:
        return None
    variances = scaled_codes.rounding_variances(*_scaled(weight, weight.scales))
    return variances.transposed if weight.transposed else variances


def _is_companion(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor belongs to the storage of another one."""
    of_blocks = name.endswith(_SCALES_OF_BLOCKS) and f"{name.removesuffix(_SCALES_OF_BLOCKS)}{_BLOCKS}" in tensors
    return of_blocks or any(name.endswith(end) and name.removesuffix(end) in tensors for end in (*_SCALES, _OFFSETS))


def _logical(name: str, tensor: StoredTensor) -> str:
    """Return what the tensor is called that MXFP4 blocks hold; other names stay."""
    return name.removesuffix(_BLOCKS) if _holds_blocks(name, tensor) else name


def _logical_shape(name: str, tensor: StoredTensor) -> list[int]:
    if not _holds_blocks(name, tensor):
        return tensor.shape
    *leading, groups, half = tensor.shape
    return [*leading, groups * 2 * half]


def _holds_blocks(name: str, tensor: StoredTensor) -> bool:
    half_block = scaled_codes.MXFP4_BLOCK[1] // 2
    return name.endswith(_BLOCKS) and tensor.dtype == "U8" and len(tensor.shape) >= 3 and tensor.shape[-1] == half_block


def _scales_of(
    tensor: str,
    shape: tuple[int, int],
    tensors: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
    config_file: Path,
    count: int | None = None,
) -> Scales | None:
    """Find the scales of a matrix, or of ``count`` experts', if it has any, and the block that their shape tells."""
    stored = tensors[tensor]
    if tensor.endswith(_BLOCKS):
        candidates = [f"{tensor.removesuffix(_BLOCKS)}{_SCALES_OF_BLOCKS}"]
        blocks = [scaled_codes.MXFP4_BLOCK]
    elif stored.dtype == _FP8:
        candidates = [f"{tensor}{end}" for end in _SCALES]
        blocks = quantisation.blocks_of(settings, shape, config_file)
    else:
        return None
    found = [name for name in candidates if name in tensors]
    if len(found) != 1:
        has = "both " + " and ".join(found) if found else "no " + " or ".join(candidates)
        raise InputError(f"{stored.file}: {tensor} is quantised and has {has}; one tensor of scales must be there")
    if f"{tensor}{_OFFSETS}" in tensors:
        raise InputError(f"{stored.file}: {tensor} has zero points; csulora reads symmetric quantisation only")
    return _fitting(found[0], tensors[found[0]], shape, blocks, count)


def _fitting(name: str, scales: StoredTensor, shape: tuple[int, int], blocks: list[Block], count: int | None) -> Scales:
    rows, columns = shape
    grids = {block: (-(-rows // block[0]), -(-columns // block[1])) for block in blocks}
    dims = scales.shape if count is None else scales.shape[1:]
    grid = (dims[0] if dims else 1, dims[1] if len(dims) == 2 else 1)
    fits = len(dims) <= 2 and (count is None or scales.shape[:1] == [count])
    block = next((block for block, expected in grids.items() if expected == grid and fits), None)
    if block is None:
        expected = " or ".join(dict.fromkeys(str(list(grid)) for grid in grids.values()))
        raise InputError(
            f"{scales.file}: {name} is {scales.shape}, but by config.json it must be {expected} for a weight of "
            f"{list(shape)}; fetch the checkpoint again, or name the unquantised repository that it was made from"
        )
    if scales.dtype not in _SCALE_DTYPES:
        raise InputError(f"{scales.file}: {name} is {scales.dtype}; scales must be {', '.join(_SCALE_DTYPES)}")
    return Scales(scales.file, name, grid, block)


def _scaled(weight: Weight, scales: Scales) -> tuple[torch.Tensor, torch.Tensor, Block, scaled_codes.CodeFormat]:
    """Return codes, scales, block and format as `scaled_codes` takes them."""
    expert = weight.part.expert if weight.part else None
    stored = read(weight.file, weight.tensor, expert)
    codes = scaled_codes.unpack_nibbles(stored) if weight.dtype == _MXFP4 else stored.view(torch.uint8)
    factors = read(scales.file, scales.tensor, expert)
    factors = scaled_codes.decode_exponents(factors) if factors.dtype == torch.uint8 else factors.float()
    if not ((factors > 0) & factors.isfinite()).all():
        raise InputError(
            f"{scales.file}: {scales.tensor} holds a scale that is not a positive number; it is damaged, fetch it again"
        )
    factors, block = factors.reshape(scales.grid), scales.block
    if weight.part is not None:
        # Gate and up share blocks of rows where the gate's end within one.
        along = 1 if weight.part.transposed else 0
        factors = factors.repeat_interleave(block[along], along).narrow(along, 0, codes.shape[along])
        selection = (slice(None), weight.part.rows) if weight.part.transposed else (weight.part.rows, slice(None))
        codes, factors = codes[selection].contiguous(), factors[selection].contiguous()
        block = (block[0], 1) if weight.part.transposed else (1, block[1])
    return codes, factors, block, SCALED[weight.dtype]


def _check_finite(matrix: torch.Tensor, weight: Weight) -> None:
    if not matrix.isfinite().all():
        raise InputError(
            f"{weight.file}: {weight.tensor} holds NaN or a number beyond float32; it is damaged, fetch it again"
        )


def _parts(weight: Weight) -> Iterator[tuple[Path, str]]:
    yield weight.file, weight.tensor
    if weight.scales is not None:
        yield weight.scales.file, weight.scales.tensor


def _update(digest: hashlib._Hash, file: Path, tensor: str) -> None:
    """Add the stored bytes of a tensor, each strip from a mapping of its own: mapped pages count once read."""
    first, size = 0, 1
    while first < size:
        data = _bytes_of(read(file, tensor))
        size = len(data)
        digest.update(data[first : first + _HASHED_AT_ONCE])
        first += _HASHED_AT_ONCE


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def read(file: Path, tensor: str, expert: int | None = None) -> torch.Tensor:
    """Return a tensor of a file, or what it holds of one expert."""
    try:
        with safe_open(file, framework="pt") as opened:
            stored: torch.Tensor = opened.get_tensor(tensor) if expert is None else opened.get_slice(tensor)[expert]
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch, if the file vanishes meanwhile
        raise InputError(f"{file}: cannot read {tensor}: {error}") from error
    return stored
