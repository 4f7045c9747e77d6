"""GPTQ and AWQ: a Linear's weight transposed, codes packed into int32 words, a scale and a zero point per group.

W[j, i] = scales[g(i), j] * (q[i, j] - z[g(i), j]), in the dtype of the scales. GPTQ packs q along its rows (the
inputs), AWQ along its columns in an order of its own; both pack z along the columns. Bits and sizes of groups follow
from the shapes. GPTQ's first format stores z - 1, modulo the number of codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensors import TensorInfo
from .weight import QuantisedWeight, Stored, groups_of, scale_into, unpacked

BITS = (2, 4, 8)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# What the configuration may call the layouts that are read here.
FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}


def find(stored: Stored) -> dict[str, QuantisedWeight]:
    """The weights that are stored so, by name; CheckpointError for what cannot be read of them."""
    modules = [name.removesuffix(".qweight") for name in stored.tensors if name.endswith(".qweight")]
    return {f"{module}.weight": _weight(stored, module) for module in modules}


def _weight(stored: Stored, module: str) -> QuantisedWeight:
    parts = [f"{module}.{end}" for end in ("qweight", "qzeros", "scales")]
    if any(part not in stored.tensors for part in parts):
        raise stored.refused(f"{module}.weight", f"{stored.format or 'packed integers'} without scales or zero points")
    words, zeros, scales = (stored.tensors[part] for part in parts)
    sound = words.dtype == zeros.dtype == torch.int32 and scales.dtype.is_floating_point
    if not sound or any(len(info.shape) != 2 or not info.numel for info in (words, zeros, scales)):
        raise stored.refused(f"{module}.weight", f"{stored.format or 'packed integers'} in an unknown layout")
    is_awq = words.shape[1] != scales.shape[1]
    name = "awq" if is_awq else "gptq"
    layout = str(stored.method.get("checkpoint_format") or stored.method.get("version") or FORMATS[name][0]).lower()
    bits = 32 * zeros.shape[1] // scales.shape[1]
    inputs = words.shape[0] if is_awq else 32 * words.shape[0] // max(1, bits)
    fits = (words.shape[1] if is_awq else zeros.shape[1]) * 32 == scales.shape[1] * bits
    if bits not in BITS or (is_awq and bits != 4) or layout not in FORMATS[name] or not fits:
        raise stored.refused(f"{module}.weight", f"{name}, {layout}, {bits} bits")
    order = f"{module}.g_idx"
    if order in stored.tensors:
        parts.append(order)
    elif groups_of(inputs, scales.shape[0], _group(stored)) is None:
        raise stored.refused(f"{module}.weight", f"{name}, {inputs} inputs in {scales.shape[0]} groups")
    read = _awq if is_awq else lambda w, z: _gptq(w, z, bits, 0 if layout == "gptq_v2" else 1)
    shape = (scales.shape[1], inputs)
    return QuantisedWeight(
        name, TensorInfo(shape, scales.dtype), tuple(parts), lambda: _dequantised(stored, parts, shape, read)
    )


Codes = Callable[[Tensor, Tensor], tuple[Callable[[int, int], Tensor], Tensor]]


def _dequantised(stored: Stored, parts: list[str], shape: tuple[int, int], read: Codes) -> Tensor:
    words, zeros, scales = (stored.read(part) for part in parts[:3])
    codes, zero_points = read(words, zeros)
    if len(parts) > 3:
        groups = stored.read(parts[3]).long()
    else:
        groups = groups_of(shape[1], len(scales), _group(stored))
        assert groups is not None
    out = torch.empty(shape, dtype=scales.dtype)
    return scale_into(out, codes, scales.T, zero_points.T, (torch.arange(shape[0]), groups))


def _group(stored: Stored) -> int | None:
    size = stored.method.get("group_size")
    return size if isinstance(size, int) and size > 0 else None


def _gptq(words: Tensor, zeros: Tensor, bits: int, less: int) -> tuple[Callable[[int, int], Tensor], Tensor]:
    """Codes by output and input, and zero points [groups, outputs]; ``less`` is what was taken from these."""
    return lambda a, b: unpacked(words[:, a:b].T, bits), (unpacked(zeros, bits) + less) % 2**bits


def _awq(words: Tensor, zeros: Tensor) -> tuple[Callable[[int, int], Tensor], Tensor]:
    def columns(packed: Tensor) -> Tensor:
        return unpacked(packed, 4).unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1)

    def codes(start: int, stop: int) -> Tensor:
        first = start // 8
        return columns(words[:, first : -(-stop // 8)])[:, start - 8 * first : stop - 8 * first].T

    return codes, columns(zeros)
