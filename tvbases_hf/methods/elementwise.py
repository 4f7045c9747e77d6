"""Merging methods that look at one entry of every vector at a time: a block of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..algebra import sums
from ..algebra.delta import Delta, Dense
from .registry import method


def by_entry(deltas: Sequence[Delta], weights: Sequence[float], merge: Callable[[Tensor, Tensor], Tensor]) -> Dense:
    """``merge([K, k] values, [K, 1] weights) -> [k]``, float64, on all K changes of one weight; see sums.by_entry."""
    column = torch.tensor(list(weights), dtype=torch.float64, device=deltas[0].device)[:, None]
    return sums.by_entry(deltas, lambda values: merge(values, column))


@method("magmax", title="MagMax", source="https://arxiv.org/abs/2407.06322")
def magmax(deltas: Sequence[Delta], weights: Sequence[float]) -> Dense:
    """Every entry from the vector where it is largest.

    In magnitude, the first of equals (MagMax, equation 4).
    """

    def largest(values: Tensor, column: Tensor) -> Tensor:
        values = values * column
        return values.gather(0, values.abs().argmax(dim=0, keepdim=True))[0]

    return by_entry(deltas, weights, largest)
