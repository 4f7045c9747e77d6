"""Methods that keep the largest entries of every vector: top-k and TIES (Yadav et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense
from ..errors import ParameterError
from .elementwise import by_entry
from .threshold import check_density, tensor_thresholds, trimmed

OVERLAPS = ("all", "shared")
CONSENSUS = ("mean", "sum")
TOP_K_DENSITY = 0.05
TIES_DENSITY = 0.2


def top_k(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float = TOP_K_DENSITY,
    overlap: str = "all",
    limits: Sequence[float] | None = None,
) -> Dense:
    """The mean of the vectors, each without all but its largest entries.

    Args:
        density: the share of entries to keep.
        overlap: what the sum is divided by: ``all`` vectors (clustering paper, appendix D: masks gamma / T), or those
            ``shared`` at the entry, that is, which keep it (dataless Localize-and-Stitch: gamma_i / sum_j gamma_j).
        limits: [K] thresholds of magnitude, of the whole model for example; None for this weight's own.
    """
    _choose("overlap", overlap, OVERLAPS)
    floor = _limits(deltas, density, limits)

    def stitch(values: Tensor, column: Tensor) -> Tensor:
        kept = trimmed(values, floor)
        holders = (kept != 0).to(torch.float64) if overlap == "shared" else torch.ones_like(kept)
        return _divided((kept * column).sum(0), (holders * column.abs()).sum(0))

    return by_entry(deltas, weights, stitch)


def ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float = TIES_DENSITY,
    consensus: str = "mean",
    limits: Sequence[float] | None = None,
) -> Dense:
    """Trim, elect signs, merge: the vectors' largest entries, where their sign is that of the weighted sum.

    Args:
        density: the share of entries to keep.
        consensus: ``mean`` of the vectors that agree with the elected sign (weighted), or their ``sum``.
        limits: [K] thresholds of magnitude, of the whole model for example; None for this weight's own.

    Where the kept entries cancel exactly no sign is elected and the result is 0 (the paper's sgn(0); the authors' code
    and mergekit take one of the two signs).
    """
    _choose("consensus", consensus, CONSENSUS)
    floor = _limits(deltas, density, limits)

    def agree(values: Tensor, column: Tensor) -> Tensor:
        kept = trimmed(values, floor) * column
        elected = kept.sum(0).sign()
        aligned = (kept.sign() == elected) & (kept != 0)
        total = (kept * aligned).sum(0)
        return total if consensus == "sum" else _divided(total, (column.abs() * aligned).sum(0))

    return by_entry(deltas, weights, agree)


def _limits(deltas: Sequence[Delta], density: float, given: Sequence[float] | None) -> Sequence[float]:
    check_density(density)
    return tensor_thresholds(deltas, density) if given is None else given


def _divided(total: Tensor, by: Tensor) -> Tensor:
    return total / torch.where(by > 0, by, torch.ones_like(by))


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ParameterError(f"{name} must be {' or '.join(known)}; got {value!r}")
