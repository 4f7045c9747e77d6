"""Task singular vectors: TSV-Merge and truncation of one weight matrix (TSV paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.components import SVD
from ..algebra.delta import Delta, Dense, Images, LowRank, dense
from ..algebra.polar import inverse_root, polar_factor
from ..algebra.rank import Rank, RankRule
from ..algebra.sums import total
from ..algebra.svd import svd
from ..algebra.tall import by_rows, gram_of_images, right_components
from .registry import method

PAPER = "https://arxiv.org/abs/2412.00081"
TaskRank = Annotated[Rank | None, Field(description="components to keep of each vector; none: 1/T of min(n, m)")]
LowRankStep = Annotated[bool, Field(description="keep only the leading components")]
Orthogonalize = Annotated[bool, Field(description="decorrelate the components of different vectors")]


def default_rank(num_tasks: int) -> RankRule:
    """1/T of the components for each of T tasks, so that all together fit the matrix (section 4.1)."""
    return RankRule("fraction", 1 / num_tasks)


@method("tsv", title="TSV-Merge", source=PAPER, of_matrices=True, by_rows=True, in_turn=True)
def tsv_merge(
    deltas: Sequence[Delta],
    weights: Sequence[float] | None = None,
    *,
    rank: TaskRank = None,
    low_rank: LowRankStep = True,
    orthogonalize: Orthogonalize = True,
) -> Delta:
    """The leading singular components of the vectors, decorrelated and added (Algorithm 1).

    Args:
        deltas: T changes of one weight. Anything but a matrix takes their mean, as in the paper.
        weights: a factor per task on its singular values; negative ones subtract.
        rank: components kept per task; None for 1/T of min(n, m).
        low_rank, orthogonalize: False switches the step off (the ablation of Table 4); with neither it is the sum.

    Returns:
        U' S V'^T as a LowRank delta for matrices (rank: the components of all tasks), as Images for large ones with
        many more rows than columns, else a Dense one.

    Duplicated tasks share their directions (see polar_factor): merging a task with its copy gives that task.
    """
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if len(deltas[0].shape) != 2:
        return _mean(deltas, weights)
    rule = _rule(rank, len(deltas)) if low_rank else None
    if (tall := by_rows(deltas)) and (found := right_components(tall, rule)) is not None:
        return _assembled_by_rows(tall, found, weights, orthogonalize)
    parts = [svd(delta, rule) for delta in deltas]
    return assemble(parts, weights, orthogonalize=orthogonalize)


@method("tsv_compress", title="TSV-Compress", source=PAPER, of_matrices=True, in_turn=True)
def tsv_compress(deltas: Sequence[Delta], weights: Sequence[float], *, rank: TaskRank = None) -> Delta:
    """The sum of the vectors, each cut to its leading singular components.

    sum_i w_i trunc(delta_i): a matrix is the best approximation of its rank, other shapes are kept whole.
    """
    rule = _rule(rank, len(deltas))
    return total([truncate(delta, rule) for delta in deltas], weights)


def assemble(parts: Sequence[SVD], weights: Sequence[float], *, orthogonalize: bool = True) -> LowRank:
    """Concatenated components of the tasks, U and V replaced by their polar factors when ``orthogonalize``."""
    left = torch.cat([part.U for part in parts], dim=1)
    right = torch.cat([part.V for part in parts], dim=1)
    values = torch.cat([part.S * weight for part, weight in zip(parts, weights, strict=True)])
    if orthogonalize:
        left, right = polar_factor(left), polar_factor(right)
    return LowRank(left * values, right.T)


def _assembled_by_rows(
    deltas: Sequence[Dense], parts: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], orthogonalize: bool
) -> Images:
    """The same of (S, V) of tall changes: U = [D_i V_i S_i^-1], and its polar factor U (U^T U)^{-1/2}."""
    maps = [vectors / values for values, vectors in parts]
    values = torch.cat([values * weight for (values, _), weight in zip(parts, weights, strict=True)])
    right = torch.cat([vectors for _, vectors in parts], dim=1)
    if not orthogonalize:
        return Images(tuple(deltas), tuple(maps), values[:, None] * right.T)
    shape = (deltas[0].shape[0], len(values))
    root = inverse_root(gram_of_images(deltas, maps), shape, torch.float32).factor
    return Images(tuple(deltas), tuple(maps), (root.to(torch.float32) * values) @ polar_factor(right).T)


def truncate(delta: Delta, rank: str | float | RankRule) -> Delta:
    """The best approximation of a matrix with the components that ``rank`` keeps; other shapes are kept whole."""
    return delta if len(delta.shape) != 2 else svd(delta, rank).low_rank()


def _rule(rank: str | float | RankRule | None, num_tasks: int) -> RankRule:
    return default_rank(num_tasks) if rank is None else RankRule.parse(rank)


def _mean(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    total: Tensor | float = 0.0
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + weight * dense(delta)
    return Dense(torch.as_tensor(total) / len(deltas))
