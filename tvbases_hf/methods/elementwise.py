"""Merging methods that look at one entry of every vector at a time: a block of each in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense, blocks


def by_entry(deltas: Sequence[Delta], weights: Sequence[float], merge: Callable[[Tensor, Tensor], Tensor]) -> Dense:
    """``merge([K, k] values, [K, 1] weights) -> [k]``, float64, on all K changes of one weight, block by block.

    The result has the stored shape and the widest stored dtype, float32 at least.
    """
    stored = [delta.tuned for delta in deltas if isinstance(delta, Dense)]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in stored], torch.float32)
    shape = stored[0].shape if stored else deltas[0].shape  # a factored convolution is flattened
    merged, start = torch.empty(math.prod(shape), dtype=dtype, device=deltas[0].device), 0
    column = torch.tensor(list(weights), dtype=torch.float64, device=merged.device)[:, None]
    for part in blocks(deltas):
        merged[start : start + part.shape[1]] = merge(part, column)
        start += part.shape[1]
    return Dense(merged.reshape(shape))


def magmax(deltas: Sequence[Delta], weights: Sequence[float]) -> Dense:
    """Every entry from the vector where it is largest in magnitude, the first of equals (MagMax, equation 4)."""

    def largest(values: Tensor, column: Tensor) -> Tensor:
        values = values * column
        return values.gather(0, values.abs().argmax(dim=0, keepdim=True))[0]

    return by_entry(deltas, weights, largest)
