"""Small dense linear algebra, float64. The one place for numerical cut-offs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtypes import promoted

# Eigenvalues of a Gram matrix below this share of the largest are left out: float64 leaves an eigenvalue of share s an
# error of eps / s, and a squared error computed with the inverse as much of the whole. This keeps that below 1e-5.
GRAM_CUTOFF = 1e-10
# Four blocks of rows spare three eighths of a symmetric product; smaller ones are no faster.
OUTER_BLOCKS, OUTER_MIN_ROWS = 4, 128


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part as float64: rounding in a sum of outer products must not make eigenvalues complex."""
    matrix = matrix.to(torch.float64)
    return (matrix + matrix.T) / 2


def solve_psd(matrix: Tensor, right: Tensor, squares: Tensor | None = None) -> Tensor:
    """Minimum-norm X with ``matrix`` X = ``right`` for a positive semidefinite matrix [k, k] that may be singular.

    Duplicated task vectors make Gram matrices singular; their null space is left out rather than amplified. With
    ``squares`` [k], the squared lengths of what the rows stand for, null and norm are judged relative to these, so
    that short vectors count like long ones.
    """
    if squares is None:
        squares = torch.ones(len(matrix), dtype=torch.float64)
    inverse = torch.where(squares > 0, squares.clamp_min(0).rsqrt(), torch.zeros_like(squares))[:, None]
    values, vectors = torch.linalg.eigh(symmetric(inverse * matrix * inverse.T))
    keep = values > GRAM_CUTOFF * values[-1].clamp_min(0)
    vectors = vectors[:, keep]
    return inverse * (vectors @ ((vectors.T @ (inverse * right)) / values[keep, None]))


def condition_number(matrix: Tensor) -> float:
    """Ratio of the extreme singular values of a tall matrix; infinity when it is rank-deficient."""
    values = torch.linalg.svdvals(matrix.to(torch.float64))
    deficient = values[-1] <= negligible(matrix.shape, torch.float64) * values[0]
    return float("inf") if deficient else float(values[0] / values[-1])


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip columns so that each one's entry of largest magnitude is positive: an eigenvector has no sign of its own."""
    rows = vectors.abs().argmax(dim=0)
    signs = torch.sign(vectors[rows, torch.arange(vectors.shape[1])])
    return vectors * torch.where(signs == 0, torch.ones_like(signs), signs)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """What a matrix is decomposed in: its own dtype, float32 at least."""
    return promoted(tensor.dtype, torch.float32)


def negligible(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
    """Singular values below this share of the largest are rounding noise in a matrix of this shape and dtype.

    eps sqrt(n + m), what independent rounding errors add up to: eps max(n, m), the usual bound on the worst case,
    would drop genuine float32 components of 5e-4 at n = 4096.
    """
    return sum(shape) ** 0.5 * torch.finfo(promoted(dtype, torch.float32)).eps


def outer_square(matrix: Tensor) -> Tensor:
    """A A^T [n, n] of A [n, m], by blocks of rows and without the half that is the other one's mirror image."""
    rows = len(matrix)
    if rows < OUTER_BLOCKS * OUTER_MIN_ROWS:
        return matrix @ matrix.T
    found = matrix.new_empty(rows, rows)
    step = -(-rows // OUTER_BLOCKS)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        found[start:stop, :stop] = matrix[start:stop] @ matrix[:stop].T
        found[:start, start:stop] = found[start:stop, :start].T
    return found


def orthonormal_columns(matrix: Tensor, cutoff: float | None = None) -> Tensor:
    """[n, rank] orthonormal basis of the column space, without singular values below ``cutoff`` times the largest."""
    if matrix.shape[1] == 0:
        return matrix
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    cutoff = negligible(matrix.shape, matrix.dtype) if cutoff is None else cutoff
    return left[:, (values > cutoff * values[0]) & (values > 0)]
