"""Polar factors: the closest matrix with orthonormal columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import negligible, outer_square

# From this many columns on float32 eigenvectors pay; smaller ones take no time in float64 either.
FAST_MIN_COLUMNS = 512
# Singular values below this share of the largest are found anew in float64, since the Gram matrix squares them.
SMALL = 0.1
# Rows that are in memory in float64 at a time.
CONVERTED_ROWS = 1024
# What a first-order correction may leave, relative to the factor: it is the square of what it corrects.
LEFT_OVER = 1e-6


class Polar(NamedTuple):
    """``factor`` [n, r] of a matrix, and the singular values that are more than rounding noise, in any order."""

    factor: Tensor
    values: Tensor


def polar_factor(matrix: Tensor) -> Tensor:
    """X (X^T X)^{-1/2}, the closest matrix to X [n, r] with orthonormal columns (TSV paper, equation 9).

    Equals P Q^T of the thin SVD X = P D Q^T. Where X is rank-deficient (duplicated tasks, or r > n) the closest
    matrix is not unique; directions that are rounding noise are then left at zero, so that the result is the partial
    isometry of X: duplicated columns share one direction instead of being torn into arbitrary ones.
    """
    return polar(matrix).factor


def polar(matrix: Tensor) -> Polar:
    """The polar factor with the singular values: by float32 where that is checked to be enough, else by float64."""
    if matrix.shape[0] < matrix.shape[1]:
        found = polar(matrix.T)
        return Polar(found.factor.T, found.values)
    if matrix.dtype == torch.float32 and matrix.shape[1] >= FAST_MIN_COLUMNS:
        found = refined_polar(matrix)
        if found is not None:
            return found
    return exact_polar(matrix)


def exact_polar(matrix: Tensor, noise_of: torch.dtype | None = None) -> Polar:
    """From the Gram matrix of the columns, in float64, whose squared condition still resolves what float32 can hold.

    ``noise_of``: the dtype whose rounding noise is no direction, where the matrix came from numbers of that.
    """
    if matrix.shape[1] == 0:
        return Polar(matrix, matrix.new_zeros(0, dtype=torch.float64))
    exact = matrix.to(torch.float64)
    root, values = inverse_root(exact.T @ exact, matrix.shape, noise_of or matrix.dtype)
    if bool((values > SMALL * values[-1:]).all()):  # a product in the matrix's own dtype is then as exact as that
        return Polar(matrix @ root.to(matrix.dtype), values)
    return Polar((exact @ root).to(matrix.dtype), values)


def inverse_root(gram: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Polar:
    """(X^T X)^{-1/2} [r, r] of X^T X, float64, for an X of this shape and dtype, zero along what is rounding noise."""
    squares, vectors = torch.linalg.eigh(gram)
    # Eigenvalues come with an error of r eps of the largest, singular values with its square root.
    noise = max(negligible(shape, dtype) ** 2, shape[1] * torch.finfo(torch.float64).eps)
    keep = (squares > noise * squares[-1:]) & (squares > 0)
    vectors, values = vectors[:, keep], squares[keep].sqrt()
    return Polar((vectors / values) @ vectors.T, values)


def refined_polar(matrix: Tensor) -> Polar | None:
    """The same from float32 eigenvectors V of the Gram matrix: half of the time. None where the check fails.

    In exact arithmetic the columns of B = X V would be orthogonal, of lengths s. With E = S^-1 B^T B S^-1 - I what they
    are not, the polar factor is B S^-1 C V^T, C_ij = I_ij - E_ij s_i / (s_i + s_j) up to the square of E. Columns of
    small s, whose Gram matrix float32 does not resolve, are made orthogonal to the others and to one another in float64
    first. The square of E, relative to the factor, is what is checked.
    """
    largest = float(matrix.abs().max())
    if not 0 < largest < float("inf"):
        return None
    matrix = matrix / largest
    squares, vectors = torch.linalg.eigh(outer_square(matrix.T))
    few = int((squares <= SMALL**2 * squares[-1]).sum())
    few_vectors, vectors = vectors[:, :few].to(torch.float64), vectors[:, few:]
    images, squares = matrix @ vectors, squares[few:, None]
    few_images = torch.cat([part.to(torch.float64) @ few_vectors for part in matrix.split(CONVERTED_ROWS)])
    step = (images.T @ few_images.to(matrix.dtype)) / squares
    few_images -= images @ step
    few_vectors, vectors = few_vectors - vectors @ step, vectors + few_vectors.to(matrix.dtype) @ step.T
    _, turn = torch.linalg.eigh(few_images.T @ few_images)
    images = torch.cat([(few_images @ turn).to(matrix.dtype), images], dim=1)
    vectors = torch.cat([(few_vectors @ turn).to(matrix.dtype), vectors], dim=1)
    values = images.norm(dim=0)
    keep = values > negligible(matrix.shape, matrix.dtype) * values.max()
    if not keep.all():
        images, vectors, values = images[:, keep], vectors[:, keep], values[keep]
    columns = images.div_(values)
    error = outer_square(columns.T)
    error.diagonal().sub_(1)
    if float(error.square().sum()) > LEFT_OVER * len(values) ** 0.5:
        return None
    columns -= columns @ (error * (values[:, None] / (values[:, None] + values)))
    return Polar(columns @ vectors.T, largest * values.to(torch.float64))
