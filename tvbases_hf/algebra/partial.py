"""Leading singular components from float32 products: every result is checked, and None where the check fails.

Both routes end with a Rayleigh-Ritz step on the matrix itself, its small Gram matrix in float64, and with the residual
of every component. What passes is an exact SVD of a matrix that close to A, relative to the component and not to the
largest, since TSV-Merge gives all directions the same weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .components import SVD, count_kept
from .linalg import outer_square, working_dtype
from .rank import RankRule

# |A v - sigma u| of every component is below this share of its sigma: where the spectrum has a gap at the cut, every
# direction is that accurate.
TOLERANCE = 3e-5
OVERSAMPLING = 8
# An eigendecomposition of an n x n matrix in float32 takes as long as products with this many times n^3 operations
# (measured: 9 to 14 for n = 1024 to 4096); what the subspace iteration may cost is this share of it.
EIGEN_OPERATIONS, AFFORDABLE = 10, 0.5
# Degrees of the first filter, whose estimates of the spectrum come from random vectors: too good, for flat ones.
FIRST_DEGREES = 3
# A polynomial that makes the largest component grow so much more than the last drowns it in float32's rounding.
GROWTH_APART = 1e8
# Eigenvalues of a float32 Gram matrix above this share of the largest are known well enough to be corrected.
RESOLVED = 1e-4
# Beside the wanted eigenvectors, this share more take part in the Rayleigh-Ritz step.
BESIDE = 1 / 32


def subspace_svd(matrix: Tensor, rank: int, *, tolerance: float = TOLERANCE) -> SVD | None:
    """Subspace iteration filtered by Chebyshev polynomials (Zhou and Saad, 2007), one block of rank + 8 vectors.

    The polynomial of A A^T is small up to the first singular value that is not wanted, as the block estimates it, and
    grows beyond; its degree follows from that gap and from the residual. Given up where the degrees that are needed
    would cost more than a share of an eigendecomposition: without a gap, that is after the first block or two.
    Cost: 4 n m rank by degree.
    """
    if matrix.shape[0] > matrix.shape[1]:
        found = subspace_svd(matrix.T, rank, tolerance=tolerance)
        return None if found is None else found.transposed()
    matrix = matrix.to(working_dtype(matrix))
    rows, columns = matrix.shape
    width = min(rows, rank + OVERSAMPLING)
    affordable = AFFORDABLE * (2 * columns + EIGEN_OPERATIONS * rows) * rows / (4 * columns * width)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis, limit = torch.linalg.qr(matrix @ start).Q, FIRST_DEGREES
    while True:
        basis, values, images = _ritz(matrix, basis)
        applied = matrix @ images  # A A^T basis
        count = min(rank, count_kept(values, matrix.shape, None, matrix.dtype))
        scale = values[:count].to(matrix.dtype)
        residual = _largest(applied[:, :count] / scale**2 - basis[:, :count])
        if residual <= tolerance:
            return SVD(basis[:, :count], scale, images[:, :count] / scale)
        needed = _degrees(values, count, residual / tolerance)
        if not needed <= affordable:
            return None
        degree = max(1, min(math.ceil(needed), limit, _most_degrees(values, count)))
        affordable, limit = affordable - degree, rows
        basis = torch.linalg.qr(_filtered(matrix, basis, applied, float(values[-1]) ** 2, degree)).Q


def refined_svd(matrix: Tensor, rule: RankRule) -> SVD | None:
    """From the eigenvectors of the Gram matrix, all of it in float32, and corrected where that is not enough.

    The residual of float32 eigenvectors grows with the square of sigma_1 / sigma_k. One step of Newton's method with
    the eigenvectors at hand (v_j (v_j^T r_i) / (lambda_i - lambda_j) for every v_j that is not kept) squares it. A
    quarter to a half of the cost of float64: 2 n^2 m for the Gram matrix and about 10 n^3 for its eigenvectors.
    """
    if matrix.shape[0] > matrix.shape[1]:
        found = refined_svd(matrix.T, rule)
        return None if found is None else found.transposed()
    matrix = matrix.to(torch.float32)
    squares, vectors = (part.flip(-1) for part in torch.linalg.eigh(outer_square(matrix)))
    count = _resolved_count(squares, matrix, rule)
    if count is None:
        return None
    more = min(len(squares), math.ceil(count * (1 + BESIDE)) + OVERSAMPLING)
    basis = vectors[:, :more]
    for corrected in (False, True):
        basis, values, images = _ritz(matrix, basis)
        scale = values[:count].to(matrix.dtype)
        rest = matrix @ (images[:, :count] / scale) - basis[:, :count] * scale
        if _largest(rest / scale) <= TOLERANCE:
            return SVD(basis[:, :count], scale, images[:, :count] / scale)
        if not corrected:
            others = vectors[:, more:]
            apart = values[:count].square() - squares[more:, None].to(values.dtype)
            step = others @ ((others.T @ (rest * scale)) / apart.to(matrix.dtype))
            basis = torch.linalg.qr(torch.cat([basis[:, :count] + step, basis[:, count:]], dim=1)).Q
    return None


def _ritz(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best left singular vectors in an orthonormal basis [n, w], values (float64, descending) and A^T of them."""
    images = matrix.T @ basis
    exact = images.to(torch.float64)
    squares, weights = torch.linalg.eigh(exact.T @ exact)
    weights = weights.flip(1).to(matrix.dtype)
    return basis @ weights, squares.flip(0).clamp_min(0).sqrt(), images @ weights


def _largest(residuals: Tensor) -> float:
    """Of the columns' lengths; 0 of none."""
    return float(residuals.norm(dim=0).max()) if residuals.shape[1] else 0.0


def _filtered(matrix: Tensor, basis: Tensor, applied: Tensor, top: float, degree: int) -> Tensor:
    """T_d(2 A A^T / top - 1) of the basis, by the polynomials' recurrence; ``applied`` is A A^T of it."""
    before, now = basis, applied * (2 / top) - basis
    for _ in range(degree - 1):
        before, now = now, (matrix @ (matrix.T @ now)) * (4 / top) - 2 * now - before
    return now


def _growth(values: Tensor, index: int) -> float:
    """The factor, as a logarithm, by which a component grows per degree beside those that are not wanted."""
    cut = float(values[-1])
    return math.acosh(max(1.0, 2 * (float(values[index]) / cut) ** 2 - 1)) if cut else math.inf


def _degrees(values: Tensor, count: int, excess: float) -> float:
    """How many it takes until the residual of the last component is ``excess`` times smaller; infinity: no gap."""
    growth = _growth(values, count - 1)
    return math.log(2 * excess) / growth if growth else math.inf


def _most_degrees(values: Tensor, count: int) -> int:
    apart = _growth(values, 0) - _growth(values, count - 1)
    return int(math.log(GROWTH_APART) / apart) if apart > 0 else len(values)


def _resolved_count(squares: Tensor, matrix: Tensor, rule: RankRule) -> int | None:
    """How many components a rule keeps by these eigenvalues; None where float32 leaves that, or them, uncertain."""
    certain = int((squares > RESOLVED * squares[0]).sum())
    if rule.kind == "gavish-donoho" and certain <= len(squares) // 2:
        return None  # the threshold is a multiple of the median
    values = squares.to(torch.float64).clamp_min(0).sqrt()
    count = rule.of_spectrum(values, *matrix.shape) if rule.needs_spectrum else rule.of_shape(*matrix.shape)
    return count if 0 < count <= certain else None
