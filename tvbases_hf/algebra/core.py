"""Matrices in the coordinates of their joint column and row spaces (Core Space, arXiv 2509.17786).

What a method of singular directions makes of low-rank changes lies in the space of their columns and the space of their
rows. There they are small matrices, on which the method's formula is the dense one: nothing is lost, and no n x m
matrix is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import Delta, Dense, LowRank, dense, work_dtype


@dataclass(frozen=True)
class Core:
    """K changes [n, m] as ``matrices`` [p, q], float64: change k is left @ matrices[k] @ right^T.

    ``left`` [n, p] and ``right`` [m, q] have orthonormal columns; None stands for the identity, where the changes are
    dense, or their ranks together are no less than the side.
    """

    matrices: list[Tensor]
    left: Tensor | None
    right: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, deltas: Sequence[Delta], weights: Sequence[float]) -> Core:
        """The changes of one matrix, each times its weight."""
        low = [delta.factors for delta in deltas if delta.factors is not None]
        dtype = work_dtype(deltas)
        if len(low) < len(deltas):
            return cls([w * dense(d) for d, w in zip(deltas, weights, strict=True)], None, None, dtype)
        left, lefts = _joint([delta.left for delta in low])
        right, rights = _joint([delta.right.T for delta in low])
        matrices = [w * (a @ b.T) for a, b, w in zip(lefts, rights, weights, strict=True)]
        return cls(matrices, left, right, dtype)

    def change(self, matrix: Tensor) -> Delta:
        """What a matrix [p, q] of these coordinates stands for."""
        if self.left is None and self.right is None:
            return Dense(matrix.to(self.dtype))
        rows, columns = matrix.shape
        one = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
        return self.product(one, matrix) if rows < columns else self.product(matrix, one)

    def product(self, left: Tensor, right: Tensor) -> LowRank:
        """What the matrix left [p, k] @ right [k, q] stands for, as factors."""
        left = left if self.left is None else self.left @ left
        right = right if self.right is None else right @ self.right.T
        return LowRank(left.to(self.dtype), right.to(self.dtype))


def _joint(factors: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """An orthonormal basis of all columns, and every factor in its coordinates."""
    exact = [factor.to(torch.float64) for factor in factors]
    widths = [factor.shape[1] for factor in exact]
    if sum(widths) >= exact[0].shape[0]:
        return None, exact
    basis, coordinates = torch.linalg.qr(torch.cat(exact, dim=1))
    return basis, list(coordinates.split(widths, dim=1))
