"""Methods that keep the largest entries of every vector: top-k and TIES (Yadav et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.delta import Delta, Dense
from .elementwise import by_entry
from .registry import method
from .threshold import tensor_thresholds, trimmed

Density = Annotated[float, Field(gt=0, le=1, description="share of the entries to keep")]
Overlap = Annotated[
    Literal["all", "shared"], Field(description="what to divide by: all vectors, or those that keep the entry")
]
Consensus = Annotated[Literal["mean", "sum"], Field(description="what becomes of the vectors that agree in sign")]
TOP_K_DENSITY = 0.05
TIES_DENSITY = 0.2


@method("top_k", title="Top-k", source="https://arxiv.org/abs/2408.13656")
def top_k(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: Density = TOP_K_DENSITY,
    overlap: Overlap = "all",
    limits: Sequence[float] | None = None,
) -> Dense:
    """The mean of the largest entries of the vectors.

    Args:
        density: the share of entries to keep.
        overlap: what the sum is divided by: ``all`` vectors (clustering paper, appendix D: masks gamma / T), or those
            ``shared`` at the entry, that is, which keep it (dataless Localize-and-Stitch: gamma_i / sum_j gamma_j).
        limits: [K] thresholds of magnitude, of the whole model for example; None for this weight's own.
    """
    floor = tensor_thresholds(deltas, density) if limits is None else limits

    def stitch(values: Tensor, column: Tensor) -> Tensor:
        kept = trimmed(values, floor)
        holders = (kept != 0).to(torch.float64) if overlap == "shared" else torch.ones_like(kept)
        return _divided((kept * column).sum(0), (holders * column.abs()).sum(0))

    return by_entry(deltas, weights, stitch)


@method("ties", title="TIES", source="https://arxiv.org/abs/2306.01708")
def ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: Density = TIES_DENSITY,
    consensus: Consensus = "mean",
    limits: Sequence[float] | None = None,
) -> Dense:
    """The largest entries of the vectors, where these agree in sign.

    Trim, elect signs, merge: kept is what has the sign of the weighted sum.

    Args:
        density: the share of entries to keep.
        consensus: ``mean`` of the vectors that agree with the elected sign (weighted), or their ``sum``.
        limits: [K] thresholds of magnitude, of the whole model for example; None for this weight's own.

    Where the kept entries cancel exactly no sign is elected and the result is 0 (the paper's sgn(0)), and entries equal
    to the smallest that is kept are all kept, so that the order of the vectors and of the entries does not matter. The
    YAML's ``ties`` is mergekit's: its + where they cancel, exactly density * size entries, float32 sums.
    """
    floor = tensor_thresholds(deltas, density) if limits is None else limits

    def agree(values: Tensor, column: Tensor) -> Tensor:
        kept = trimmed(values, floor) * column
        aligned = (kept.sign() == elected(kept.sum(0))) & (kept != 0)
        total = (kept * aligned).sum(0)
        return total if consensus == "sum" else _divided(total, (column.abs() * aligned).sum(0))

    return by_entry(deltas, weights, agree)


def elected(total: Tensor, cancelled: float = 0.0) -> Tensor:
    """The sign of every sum; of one that is 0, ``cancelled`` (mergekit: 1)."""
    return torch.where(total == 0, cancelled, total.sign())


def _divided(total: Tensor, by: Tensor) -> Tensor:
    return total / torch.where(by > 0, by, torch.ones_like(by))
