"""Eight-bit floats with scales beside them: DeepSeek's and Qwen's blocks, channels, one scale for the tensor.

A weight is its codes times its scale, whatever the scale is called (``weight_scale_inv`` multiplies too). transformers
(FineGrainedFP8), fbgemm and ModelOpt multiply in float32, compressed-tensors in the dtype of the scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import TensorInfo
from .weight import QuantisedWeight, Stored, groups_of, scale_into

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
EXPONENTS = torch.float8_e8m0fnu
# What the scale of a weight is called, after its name and after that of its module.
OF_WEIGHT = ("_scale_inv", "_scale")
OF_MODULE = (".scale", ".scale_inv", ".qscale_weight", ".scale_weight")
BIAS = 127


def find(stored: Stored) -> dict[str, QuantisedWeight]:
    """The weights that are stored so, by name; CheckpointError for scales that do not fit."""
    found = {}
    for name, info in stored.tensors.items():
        scale = scale_of(stored, name) if info.dtype in CODES else None
        if scale is not None:
            found[name] = _weight(stored, name, scale)
    return found


def scale_of(stored: Stored, name: str) -> str | None:
    """The tensor that holds the scales of a weight."""
    module = name.removesuffix(".weight")
    places = [name + end for end in OF_WEIGHT] + [module + end for end in OF_MODULE if module != name]
    return next((place for place in places if place in stored.tensors), None)


def _weight(stored: Stored, name: str, scale: str) -> QuantisedWeight:
    info, grid = stored.tensors[name], stored.tensors[scale]
    own = stored.format == "compressed-tensors" and grid.dtype.is_floating_point and grid.dtype.itemsize > 1
    dtype = grid.dtype if own else torch.float32
    places = places_of(stored, info.shape, grid.shape)
    if places is None or info.numel == 0:
        raise stored.refused(name, f"{list(info.shape)} float8 codes with {list(grid.shape)} scales")

    def dequantise() -> Tensor:
        codes = stored.read(name).reshape(-1, *_matrix(info.shape))
        scales = numbers(stored.read(scale)).to(dtype)
        scales = scales.reshape(_grid(info.shape, grid.shape)).expand(len(codes), -1, -1)
        out = torch.empty(codes.shape, dtype=dtype)
        for part, own, scale_of_part in zip(out, codes, scales, strict=True):
            scale_into(part, lambda a, b, own=own: own[a:b], scale_of_part, None, places)
        return out.reshape(info.shape)

    return QuantisedWeight("float8", TensorInfo(info.shape, dtype), (name, scale), dequantise)


def numbers(scales: Tensor) -> Tensor:
    """The scales as numbers: bytes are exponents of two (E8M0)."""
    return (scales.to(torch.float32) - BIAS).exp2() if scales.dtype == torch.uint8 else scales


def _block(stored: Stored) -> tuple[int | None, int | None]:
    """The configured size of a block in rows and columns."""
    groups = stored.method.get("config_groups")
    args = [g.get("weights") or {} for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    sizes = [stored.method.get("weight_block_size"), *(arg.get("block_structure") for arg in args)]
    for size in sizes:
        if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size):
            return size[0], size[1]
    return None, None


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The last two dimensions, [1, n] of a vector."""
    rows = shape[-2] if len(shape) > 1 else 1
    return rows, shape[-1] if shape else 1


def _grid(shape: Sequence[int], grid: Sequence[int]) -> tuple[int, int, int]:
    """The scales' shape as [experts or 1, rows of blocks, columns of blocks]; a list of them goes along the first."""
    if math.prod(grid) == 1:
        return 1, 1, 1
    if len(grid) == 1:
        return (1, grid[0], 1) if len(shape) <= 2 else (grid[0], 1, 1)
    return math.prod(grid[:-2]), grid[-2], grid[-1]


def places_of(stored: Stored, shape: Sequence[int], grid: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Which of the scales ``grid`` belongs to each row and each column of a weight; None where they do not fit."""
    (rows, columns), (experts, *counts), block = _matrix(shape), _grid(shape, grid), _block(stored)
    if experts not in (1, math.prod(shape[:-2])):
        return None
    of_rows, of_columns = groups_of(rows, counts[0], block[0]), groups_of(columns, counts[1], block[1])
    return None if of_rows is None or of_columns is None else (of_rows, of_columns)
