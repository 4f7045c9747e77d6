"""Numbers that are not finite: found in one pass, without a copy of the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BLOCK_NUMBERS


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # eight-bit floats have no such operations of their own
        return all(is_finite(part.to(torch.float32)) for part in tensor.reshape(-1).split(BLOCK_NUMBERS))
    low, high = torch.aminmax(tensor)  # both are NaN where one number is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def count_not_finite(tensor: Tensor, agreed: Tensor | None = None) -> int:
    """How many numbers are NaN or infinite, apart from infinities that ``agreed``, of the same shape, holds as well."""
    if is_finite(tensor):
        return 0
    flat, found = tensor.reshape(-1), 0
    for start in range(0, len(flat), BLOCK_NUMBERS):
        part = flat[start : start + BLOCK_NUMBERS].to(torch.float64)
        bad = ~torch.isfinite(part)
        if agreed is not None:
            other = agreed.reshape(-1)[start : start + BLOCK_NUMBERS].to(part.device, torch.float64)
            bad &= ~(torch.isinf(part) & (part == other))
        found += int(bad.sum())
    return found
