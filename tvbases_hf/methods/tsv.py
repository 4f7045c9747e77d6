"""Task singular vectors: TSV-Merge, truncation and singular task interference of one weight matrix (TSV paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense, LowRank, dense
from ..algebra.linalg import polar_factor
from ..algebra.rank import RankRule
from ..algebra.svd import SVD, svd


def default_rank(num_tasks: int) -> RankRule:
    """1/T of the components for each of T tasks, so that all together fit the matrix (section 4.1)."""
    return RankRule("fraction", 1 / num_tasks)


def tsv_merge(
    deltas: Sequence[Delta],
    weights: Sequence[float] | None = None,
    *,
    rank: str | float | RankRule | None = None,
    low_rank: bool = True,
    orthogonalize: bool = True,
) -> Delta:
    """The merged change of one weight (Algorithm 1): sum of the tasks' leading components, decorrelated.

    Args:
        deltas: T changes of one weight. Anything but a matrix takes their mean, as in the paper.
        weights: a factor per task on its singular values; negative ones subtract.
        rank: components kept per task; None for 1/T of min(n, m).
        low_rank, orthogonalize: False switches the step off (the ablation of Table 4); with neither it is the sum.

    Returns:
        U' S V'^T as a LowRank delta for matrices (rank: the components of all tasks), else a Dense one.

    Duplicated tasks share their directions (see polar_factor): merging a task with its copy gives that task.
    """
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if len(deltas[0].shape) != 2:
        return _mean(deltas, weights)
    rule = (default_rank(len(deltas)) if rank is None else RankRule.parse(rank)) if low_rank else None
    parts = [svd(delta, rule) for delta in deltas]
    return assemble(parts, weights, orthogonalize=orthogonalize)


def assemble(parts: Sequence[SVD], weights: Sequence[float], *, orthogonalize: bool = True) -> LowRank:
    """Concatenated components of the tasks, U and V replaced by their polar factors when ``orthogonalize``."""
    left = torch.cat([part.U for part in parts], dim=1)
    right = torch.cat([part.V for part in parts], dim=1)
    values = torch.cat([part.S * weight for part, weight in zip(parts, weights, strict=True)])
    if orthogonalize:
        left, right = polar_factor(left), polar_factor(right)
    return LowRank(left * values, right.T)


def interference(parts: Sequence[SVD]) -> float:
    """Singular task interference, the entrywise 1-norm of (U^T U - I) S (V^T V - I) (equation 7)."""
    left = torch.cat([part.U for part in parts], dim=1).to(torch.float64)
    right = torch.cat([part.V for part in parts], dim=1).to(torch.float64)
    values = torch.cat([part.S for part in parts]).to(torch.float64)
    identity = torch.eye(len(values), dtype=torch.float64, device=values.device)
    return float((((left.T @ left - identity) * values) @ (right.T @ right - identity)).abs().sum())


def truncate(delta: Delta, rank: str | float | RankRule) -> Delta:
    """The best approximation of a matrix with the components that ``rank`` keeps; other shapes are kept whole."""
    return delta if len(delta.shape) != 2 else svd(delta, rank).low_rank()


def _mean(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    total: Tensor | float = 0.0
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + weight * dense(delta)
    return Dense(torch.as_tensor(total) / len(deltas))
