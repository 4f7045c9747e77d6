"""MXFP4 experts as gpt-oss stores them: blocks of 32 four-bit floats with an exponent each (OCP Microscaling, v1.0).

``N_blocks`` [experts, outputs, groups, 16] holds two codes a byte, the low half first, ``N_scales`` [experts, outputs,
groups] the exponent plus 127. The weight is [experts, inputs, outputs], as the model computes with it; every number is
one of bfloat16, so nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import TensorInfo
from .weight import QuantisedWeight, Stored, row_chunks

BLOCKS, SCALES = "_blocks", "_scales"
BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE = MAGNITUDES + tuple(-value for value in MAGNITUDES)


def find(stored: Stored) -> dict[str, QuantisedWeight]:
    """The weights that are stored so, by name; CheckpointError for what cannot be read of them."""
    names = [name.removesuffix(BLOCKS) for name in stored.tensors if name.endswith(BLOCKS)]
    return {name: _weight(stored, name) for name in names if name + SCALES in stored.tensors}


def _weight(stored: Stored, name: str) -> QuantisedWeight:
    blocks, scales = stored.tensors[name + BLOCKS], stored.tensors[name + SCALES]
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape[:-1] != scales.shape:
        raise stored.refused(name, f"mxfp4, {list(blocks.shape)} blocks with {list(scales.shape)} scales")
    if len(blocks.shape) != 4:
        raise stored.refused(name, f"mxfp4, {list(blocks.shape)} blocks")
    experts, outputs, groups, half = blocks.shape
    info = TensorInfo((experts, groups * half * 2, outputs), torch.bfloat16)

    def dequantise() -> Tensor:
        codes, exponents = stored.read(name + BLOCKS), stored.read(name + SCALES)
        table, out = torch.tensor(TABLE, dtype=torch.bfloat16), torch.empty(info.shape, dtype=torch.bfloat16)
        for expert in range(experts):
            for start, stop in row_chunks(outputs, info.shape[1]):
                part = codes[expert, start:stop].int()
                values = table[torch.stack([part & 15, part >> 4], dim=-1).flatten(-2)]
                power = exponents[expert, start:stop, :, None].int() - BIAS
                out[expert, :, start:stop] = torch.ldexp(values, power).reshape(stop - start, -1).T
        return out

    return QuantisedWeight("mxfp4", info, (name + BLOCKS, name + SCALES), dequantise)
