"""Singular components of a matrix, and how many of them count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import LowRank
from .linalg import negligible
from .rank import RankRule


@dataclass(frozen=True)
class SVD:
    """U [n, k], S [k] descending, V [m, k]: the matrix is about U diag(S) V^T.

    No S is rounding noise (linalg.negligible): the vectors that belong to noise are arbitrary, and whatever gives all
    vectors the same weight, such as a polar factor, would take them for directions of the task.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        return len(self.S)

    def keep(self, rank: int) -> SVD:
        return SVD(self.U[:, :rank], self.S[:rank], self.V[:, :rank])

    def transposed(self) -> SVD:
        return SVD(self.V, self.S, self.U)

    def low_rank(self) -> LowRank:
        """U diag(S) and V^T as a delta."""
        return LowRank(self.U * self.S, self.V.T)


def count_kept(values: Tensor, shape: Sequence[int], rule: RankRule | None, dtype: torch.dtype) -> int:
    """How many of the descending singular values a rule keeps; never those that are rounding noise."""
    significant = values[values > negligible(shape, dtype) * values[:1]]
    if rule is None or len(significant) == 0:
        return len(significant)
    wanted = rule.of_spectrum(significant, *shape) if rule.needs_spectrum else rule.of_shape(*shape)
    return min(wanted, len(significant))
