"""GGUF's types with levels of four bits, E2M1, and a scale per block: MXFP4 and NVFP4, as codes and scales."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from csulora.models.scaled_codes import MXFP4, MXFP4_BLOCK, NVFP4, NVFP4_BLOCK, decode_exponents

FORMATS = {
    GGMLQuantizationType.MXFP4: (MXFP4_BLOCK, MXFP4),
    GGMLQuantizationType.NVFP4: (NVFP4_BLOCK, NVFP4),
}
_SCALES_PER_BLOCK = {GGMLQuantizationType.MXFP4: 1, GGMLQuantizationType.NVFP4: 4}


def unpack(rows: np.ndarray, kind: GGMLQuantizationType) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a matrix apart.

    Args:
        rows: its bytes, (m, bytes of a row) uint8.
        kind: one of `FORMATS`.

    Returns:
        The codes, (m, n) uint8, and the scales, (m, n / entries of a scale) float32.
    """
    scales = _SCALES_PER_BLOCK[kind]
    (_, entries), _ = FORMATS[kind]
    blocks = rows.reshape(-1, scales + scales * entries // 2)
    packed = torch.from_numpy(blocks[:, scales:].copy()).view(-1, entries // 2)
    codes = torch.cat([packed & 0x0F, packed >> 4], 1)  # a scale's first entries, and then the others
    return codes.view(len(rows), -1), _decode(blocks[:, :scales], kind).view(len(rows), -1)


def _decode(scales: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    if kind == GGMLQuantizationType.MXFP4:
        return decode_exponents(torch.from_numpy(scales.copy()))
    # gguf's are half as large, since its levels are twice as large.
    return 2 * torch.from_numpy(quants.NVFP4.ue4m3_to_fp32(scales)).float()
