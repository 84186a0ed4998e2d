"""Base matrices that an adapter holds besides its update: allowed where they are the aligned checkpoint's, bit by bit.

PEFT saves the embedding and the head with an adapter that targets them, and writes them over the model's on loading.
"""

from __future__ import annotations

import hashlib

import torch

from csulora.adapters.lora import Adapter
from csulora.errors import BaseCopyError
from csulora.models.resolver import Resolver
from csulora.subspace.provenance import StoredMatrix
from csulora.subspace.subspace import Subspace

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_WITHOUT_COPIES = "save the adapter without it: save_pretrained(..., save_embedding_layers=False)"


def check_copies(adapter: Adapter, subspace: Subspace) -> None:
    """Raise `RefusedError` unless all of an adapter's copies are matrices of the subspace's aligned checkpoint."""
    vocabulary = subspace.provenance.vocabulary
    resolver = Resolver(vocabulary)
    for module, copy in adapter.copies.items():
        what = f"{adapter.path}: holds a copy of the base model's {module}"
        found = resolver.resolve(module)
        if found is None:
            raise BaseCopyError(
                f"{what}, and the subspace file has no hash to compare it with; {_WITHOUT_COPIES}, or extract the "
                "subspace file again from a checkpoint whose embedding is not quantised"
            )
        if not _is_copy(copy, vocabulary[found.module]):
            raise BaseCopyError(
                f"{what} that differs from the aligned checkpoint's, and PEFT would load it in its place; "
                f"{_WITHOUT_COPIES}"
            )


def _is_copy(copy: torch.Tensor, stored: StoredMatrix) -> bool:
    """Whether a copy, converted to the type of the original, has its bytes, and converted back its own."""
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None or tuple(copy.shape) != stored.shape:
        return False
    converted = copy.to(dtype)
    same = torch.equal(_bytes(converted.to(copy.dtype)), _bytes(copy))
    return same and hashlib.sha256(_bytes(converted).numpy().data).hexdigest() == stored.sha256


def _bytes(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.cpu().contiguous().view(torch.uint8)
