"""Small dense linear algebra, float64. The one place for numerical cut-offs."""

from __future__ import annotations

import torch
from torch import Tensor

# Eigenvalues of a Gram matrix below this share of the largest are rounding noise of its float64 accumulation.
GRAM_CUTOFF = 1e-13


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part as float64: rounding in a sum of outer products must not make eigenvalues complex."""
    matrix = matrix.to(torch.float64)
    return (matrix + matrix.T) / 2


def solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """Minimum-norm X with ``matrix`` X = ``right`` for a positive semidefinite matrix [k, k] that may be singular.

    Duplicated task vectors make Gram matrices singular; their null space is left out rather than amplified.
    """
    values, vectors = torch.linalg.eigh(symmetric(matrix))
    keep = values > GRAM_CUTOFF * values[-1].clamp_min(0)
    vectors = vectors[:, keep]
    return vectors @ ((vectors.T @ right) / values[keep, None])


def condition_number(matrix: Tensor) -> float:
    """Ratio of the extreme singular values of a tall matrix; infinity when it is rank-deficient."""
    values = torch.linalg.svdvals(matrix.to(torch.float64))
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip columns so that each one's entry of largest magnitude is positive: an eigenvector has no sign of its own."""
    rows = vectors.abs().argmax(dim=0)
    signs = torch.sign(vectors[rows, torch.arange(vectors.shape[1])])
    return vectors * torch.where(signs == 0, torch.ones_like(signs), signs)
