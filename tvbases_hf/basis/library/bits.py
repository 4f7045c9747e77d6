"""Rows of numbers in 16, 8 or 4 bits: whole numbers, and a scale for every group of them.

A row of d numbers is cut into groups of GROUP; number = code * scale, codes from -q to q with q = 2^(bits - 1) - 1,
scales bfloat16. Codes of 16 bits are little-endian, of 8 bits two's complement, of 4 bits two in a byte, the first one
low, each plus 8. A row begins at a whole byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = (16, 8, 4)
GROUP = 64
SCALE_BYTES = 2
# Squared error of rounding, as a share of the squared norm, of normal numbers in groups of GROUP (measured).
NOISE = {16: 5e-10, 8: 3.3e-5, 4: 9.0e-3}
# Scales tried for 4 bits, as shares of the one that holds the largest number of a group: cutting that one off can pay.
TRIED = (1.0, 0.9, 0.8)


def groups(size: int) -> int:
    return -(-size // GROUP)


def row_bytes(size: int, bits: int) -> int:
    """What a row of ``size`` numbers takes, scales included."""
    return -(-size * bits // 8) + SCALE_BYTES * groups(size)


def quantise(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[..., d] float32 rows as codes [..., bytes] uint8 and scales [..., groups] bfloat16."""
    size, largest = rows.shape[-1], 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(rows, (0, groups(size) * GROUP - size)).unflatten(-1, (-1, GROUP))
    top = padded.abs().amax(dim=-1, keepdim=True) / largest
    best, codes, scales = None, None, None
    for share in TRIED if bits == 4 else (1.0,):
        # Rounded up: bfloat16 has few digits, and the largest number must fit.
        scale = (top * share * (1 + 2**-7)).to(torch.bfloat16).to(torch.float32)
        found = (padded / torch.where(scale > 0, scale, torch.ones_like(scale))).round().clamp(-largest, largest)
        lost = (found * scale - padded).square().sum(dim=-1, keepdim=True)
        if best is None or codes is None or scales is None:
            best, codes, scales = lost, found, scale
        else:
            better = lost < best
            best, codes = torch.where(better, lost, best), torch.where(better, found, codes)
            scales = torch.where(better, scale, scales)
    assert codes is not None and scales is not None
    return _packed(codes.flatten(-2)[..., :size], bits), scales[..., 0].to(torch.bfloat16)


def dequantise(codes: Tensor, scales: Tensor, size: int, bits: int) -> Tensor:
    """The inverse: [..., size] float32."""
    if bits == 4:
        numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :size].to(torch.float32) - 8
    else:
        # A copy, because 16 bits at an odd byte are no view.
        numbers = codes.clone().view(torch.int16 if bits == 16 else torch.int8).to(torch.float32)
    return numbers * scales.to(torch.float32).repeat_interleave(GROUP, dim=-1)[..., :size]


def _packed(codes: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return codes.to(torch.int16).contiguous().view(torch.uint8)
    if bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    shifted = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, codes.shape[-1] % 2))
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def encode_stack(rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [K, d], the first counts[0] in 16 bits and so on: codes and scales, flat, and the rows as they come back."""
    codes, scales, back, start = [], [], [], 0
    for count, bits in zip(counts, BITS, strict=True):
        if count:
            found, scale = quantise(rows[start : start + count], bits)
            codes.append(found.flatten())
            scales.append(scale.flatten())
            back.append(dequantise(found, scale, rows.shape[-1], bits))
            start += count
    if not codes:
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.bfloat16), rows[:0]
    return torch.cat(codes), torch.cat(scales), torch.cat(back)


def decode_stack(codes: Tensor, scales: Tensor, counts: Sequence[int], size: int) -> Tensor:
    """[K, size] float32 from the flat codes and scales of one stack."""
    rows, at, scale_at = [torch.empty(0, size)], 0, 0
    for count, bits in zip(counts, BITS, strict=True):
        if count:
            wide, number = -(-size * bits // 8), groups(size)
            part, scale = codes[at : at + count * wide], scales[scale_at : scale_at + count * number]
            rows.append(dequantise(part.reshape(count, wide), scale.reshape(count, number), size, bits))
            at, scale_at = at + count * wide, scale_at + count * number
    return torch.cat(rows)
