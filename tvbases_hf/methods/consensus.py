"""Masks of what matters to a task (TALL masks), and the merge of what matters to several (Wang et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..algebra.delta import Delta, Dense
from .elementwise import by_entry
from .registry import method

Mask = Annotated[float, Field(gt=0, description="an entry matters if it is this share of what the others add up to")]
Agree = Annotated[int, Field(ge=1, description="vectors that an entry has to matter to")]


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
