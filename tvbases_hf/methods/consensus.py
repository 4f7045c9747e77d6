"""Entries that several vectors agree on: that they need (Wang et al., 2024), or the sign of (Kim et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..algebra.delta import Delta, Dense
from .elementwise import by_entry
from .registry import method

Mask = Annotated[
    float, Field(gt=0, description="an entry matters if it is at least this share of the sum of the others")
]
Agree = Annotated[int, Field(ge=1, description="how many vectors an entry has to matter to")]


@method("consensus", title="Consensus Task Arithmetic", source="https://arxiv.org/abs/2405.07813")
def consensus(deltas: Sequence[Delta], weights: Sequence[float], *, mask: Mask = 0.4, agree: Agree = 2) -> Dense:
    """The sum of the vectors, of those entries that matter to several of them.

    An entry x_t matters to vector t if |x_t| >= mask |sum_s x_s - x_t|, weights included;
    entries that fewer than ``agree`` vectors need are zero. Of fewer vectors than that all have to agree.
    """
    needed = min(agree, len(deltas))

    def agreed(values: Tensor, column: Tensor) -> Tensor:
        values = values * column
        merged = values.sum(dim=0)
        matters = values.abs() >= mask * (merged - values).abs()
        return merged * (matters.sum(dim=0) >= needed)

    return by_entry(deltas, weights, agreed)


@method("negmerge", title="NegMerge", source="https://arxiv.org/abs/2410.05583")
def negmerge(deltas: Sequence[Delta], weights: Sequence[float]) -> Dense:
    """The mean of the vectors, of those entries whose sign is the same in all of them.

    For several fine-tunes of one task that is to be forgotten: what only some of them changed is not taken away.
    """

    def agreed(values: Tensor, column: Tensor) -> Tensor:
        values = values * column
        same = (values > 0).all(dim=0) | (values < 0).all(dim=0)
        return values.mean(dim=0) * same

    return by_entry(deltas, weights, agreed)
