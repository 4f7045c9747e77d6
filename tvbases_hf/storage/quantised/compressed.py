"""compressed-tensors (llm-compressor): integers with scales, as int8 or packed into int32 words; float8 is in float8.

(code - zero point) * scale in the dtype of the scales. Packed codes of b bits are stored plus 2^(b - 1), the lowest
bits of a word first; packed zero points go along the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import TensorInfo
from .float8 import places_of
from .weight import QuantisedWeight, Stored, scale_into, unpacked

BITS = (2, 4, 8)


def find(stored: Stored) -> dict[str, QuantisedWeight]:
    """The weights that are stored so, by name; CheckpointError for what cannot be read of them."""
    found, is_ours = {}, stored.format in ("", "compressed-tensors")
    for name, info in stored.tensors.items():
        if name.endswith(".weight_packed"):
            weight = name.removesuffix("_packed")
            found[weight] = _packed(stored, weight)
        elif name.endswith(".weight") and info.dtype == torch.int8 and f"{name}_scale" in stored.tensors and is_ours:
            found[name] = _bytes(stored, name)
    return found


def _bytes(stored: Stored, name: str) -> QuantisedWeight:
    info, zero = stored.tensors[name], f"{name}_zero_point"
    scales = stored.tensors[f"{name}_scale"]
    places = places_of(stored, info.shape, scales.shape) if len(info.shape) == 2 else None
    if places is None or not scales.dtype.is_floating_point:
        raise stored.refused(name, f"{list(info.shape)} int8 codes with {list(scales.shape)} scales")
    parts = (name, f"{name}_scale", *([zero] if zero in stored.tensors else []))

    def dequantise() -> Tensor:
        codes, grid, *zeros = (stored.read(part) for part in parts)
        out = torch.empty(info.shape, dtype=grid.dtype)
        return scale_into(out, lambda a, b: codes[a:b], _matrix(grid), _matrix(zeros[0]) if zeros else None, places)

    return QuantisedWeight("compressed-tensors", TensorInfo(info.shape, scales.dtype), parts, dequantise)


def _packed(stored: Stored, name: str) -> QuantisedWeight:
    what = f"compressed-tensors {stored.method.get('format') or 'packed'}"
    ends = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")
    parts = {end: name + end for end in ends if name + end in stored.tensors}
    words, scales = stored.tensors[name + "_packed"], stored.tensors.get(name + "_scale")
    if scales is None or "_shape" not in parts or words.dtype != torch.int32 or not scales.dtype.is_floating_point:
        raise stored.refused(name, what)
    shape = tuple(int(size) for size in stored.read(parts["_shape"]))
    bits = 32 * words.shape[-1] // shape[-1] if len(shape) == 2 and shape[-1] > 0 else 0
    places = places_of(stored, shape, scales.shape) if bits in BITS and words.shape[0] == shape[0] else None
    if places is None:
        raise stored.refused(name, f"{what}, {bits} bits, {list(shape)} with {list(scales.shape)} scales")

    def dequantise() -> Tensor:
        read = {end: stored.read(part) for end, part in parts.items()}
        packed, (rows, columns) = read["_packed"], places
        if "_g_idx" in read and bool((read["_g_idx"] >= 0).all()):
            columns = read["_g_idx"].long()
        zeros = read.get("_zero_point")
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = _signed(zeros.T, bits).T[: shape[0]]
        return scale_into(
            torch.empty(shape, dtype=scales.dtype),
            lambda a, b: _signed(packed[a:b], bits)[:, : shape[1]],
            _matrix(read["_scale"]),
            None if zeros is None else _matrix(zeros),
            (rows, columns),
        )

    return QuantisedWeight("compressed-tensors", TensorInfo(shape, scales.dtype), tuple(parts.values()), dequantise)


def _signed(words: Tensor, bits: int) -> Tensor:
    return unpacked(words, bits) - 2 ** (bits - 1)


def _matrix(scales: Tensor) -> Tensor:
    """The scales as [rows of groups, columns of groups]: one number, or one per row, may stand alone."""
    return scales.reshape(len(scales) if scales.ndim else 1, -1)
