"""Truncated singular value decompositions: exact, fast with an error estimate, and of products that stay factored."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ParameterError
from .components import SVD, count_kept
from .delta import Delta, LowRank, dense
from .linalg import working_dtype
from .partial import refined_svd, subspace_svd
from .rank import RankRule

# Partial decompositions pay from these sides on, and below these shares of all components: without a gap in the
# spectrum the first is given up early; the second computes all eigenvectors, if in float32.
FAST_MIN_SIDE, FAST_MAX_SHARE = 512, 1 / 3
REFINED_MIN_SIDE, REFINED_MAX_SHARE = 768, 1 / 2
# Of numbers whose largest is in between, float32 holds the squares of all sums of products.
LEAST, MOST = 1e-10, 1e10
# Singular values above this share of the largest keep more than float32's digits when squared in float64.
SQUARED_SAFELY = 1e-3
# Singular values above this share leave their vectors an error of 1e-8 when squared in float64.
RANGE_SAFELY = 1e-4
# Factors this many times as long as they are wide are tall.
TALL = 8


def svd(delta: Delta | Tensor, rank: str | float | RankRule | None = None, *, route: str = "auto") -> SVD:
    """The leading singular components of a matrix, or of a low-rank delta in factor space.

    Args:
        delta: [n, m]; a dense change is computed in float32, a tensor in its own dtype, float32 at least.
        rank: a rank rule; None for all components. Fewer where the rest is rounding noise, none of a zero matrix.
        route: ``exact``, ``fast`` (subspace iteration, and exact where that does not converge) or ``auto``.
    """
    if route not in ("auto", "exact", "fast"):
        raise ParameterError(f"unknown route {route!r}; choose auto, exact or fast")
    rule = None if rank is None else RankRule.parse(rank)
    low = None if isinstance(delta, Tensor) else delta.factors
    if low is not None:
        return factored_svd(low, rule)
    if len(delta.shape) != 2:
        raise ParameterError(f"a singular value decomposition needs a matrix; got shape {list(delta.shape)}")
    matrix = delta if isinstance(delta, Tensor) else dense(delta, torch.float32)
    found = None if rule is None or route == "exact" else _partial(matrix, rule, fast=route == "fast")
    return exact_svd(matrix, rule) if found is None else found


def _partial(matrix: Tensor, rule: RankRule, fast: bool) -> SVD | None:
    """By the routes that pay for a matrix of this shape and dtype and this many components, or the one asked for.

    First by products alone, which is given up where the spectrum has no gap, then by float32 eigenvectors. None where
    neither pays, or neither passes its check.
    """
    side = min(matrix.shape)
    share = None if rule.needs_spectrum or not side else rule.of_shape(*matrix.shape) / side
    if not fast and (working_dtype(matrix) != torch.float32 or side < FAST_MIN_SIDE):
        return None
    if not side or not LEAST < float(matrix.abs().max()) < MOST:
        return None
    found = None
    if share is not None and (fast or share <= FAST_MAX_SHARE):
        found = subspace_svd(matrix, rule.of_shape(*matrix.shape))
    if found is None and not fast and side >= REFINED_MIN_SIDE and (share is None or share <= REFINED_MAX_SHARE):
        found = refined_svd(matrix, rule)
    return found


def exact_svd(matrix: Tensor, rank: RankRule | None = None) -> SVD:
    """From the eigenvectors of the small side's Gram matrix, refined where it is needed; all in float64.

    Squaring costs half of the digits; float64 has twice those of float32. Down to SQUARED_SAFELY of the largest
    singular value that is enough. Below, a Rayleigh-Ritz step (projection on the eigenvectors, thin QR, SVD of the
    small factor) restores the digits. A float64 matrix has none to spare and takes the ordinary SVD.
    Cost: 2 n^2 m for the Gram matrix and O(n^3) for its eigenvectors, n the smaller side.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return exact_svd(matrix.T, rank).transposed()
    dtype, exact = working_dtype(matrix), matrix.to(torch.float64)
    if dtype == torch.float64:
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        return SVD(left, values, right.T).keep(count_kept(values, matrix.shape, rank, dtype))
    squares, left = torch.linalg.eigh(exact @ exact.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    count = count_kept(values, matrix.shape, rank, dtype)
    left, values = left.flip(1)[:, :count], values[:count]
    right = exact.T @ left
    if (values > SQUARED_SAFELY * values[:1]).all():
        right = right / values
    else:
        right, core = torch.linalg.qr(right)
        inner_left, values, inner_right = torch.linalg.svd(core.T)
        left, right = left @ inner_left, right @ inner_right.T
    return SVD(left.to(dtype), values.to(dtype), right.to(dtype))


def singular_values(delta: Delta | Tensor) -> Tensor:
    """All min(n, m) singular values (r of a low-rank delta), descending, float64."""
    low = None if isinstance(delta, Tensor) else delta.factors
    if low is not None:
        return factored_svd(low).S.to(torch.float64)
    matrix = delta.to(torch.float64) if isinstance(delta, Tensor) else dense(delta)
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0).sqrt()


def factored_svd(delta: LowRank, rank: RankRule | None = None) -> SVD:
    """SVD of left @ right by two thin QRs and one small SVD in float64: O((n + m) r^2), never n x m.

    left right = Q_l (R_l R_r^T) Q_r^T. The orthogonal factors stay Householder reflections and are applied only to the
    singular vectors of the core that are kept: with few of them, a third of the cost of forming Q_l and Q_r. Factors of
    few columns that are far from dependent go by Gram matrices instead, which tall matrices make several times faster.
    """
    dtype = torch.promote_types(working_dtype(delta.left), working_dtype(delta.right))
    if dtype == torch.float32 and TALL * delta.rank <= min(delta.shape):
        found = _by_squares(delta, rank)
        if found is not None:
            return found
    reflected = [torch.geqrf(factor.to(torch.float64)) for factor in (delta.left, delta.right.T)]
    cores = [packed[: min(packed.shape)].triu() for packed, _ in reflected]
    left, values, right = torch.linalg.svd(cores[0] @ cores[1].T, full_matrices=False)
    count = count_kept(values, delta.shape, rank, dtype)
    U, V = (
        _reflect(packed, scales, part[:, :count]).to(dtype)
        for (packed, scales), part in zip(reflected, (left, right.T), strict=True)
    )
    return SVD(U, values[:count].to(dtype), V)


def _by_squares(delta: LowRank, rank: RankRule | None) -> SVD | None:
    """The same with L = (L V s^-1) (s V^T), s^2 and V of L^T L in float64; None where squaring loses digits.

    With s above RANGE_SAFELY of the largest, L V s^-1 is orthonormal up to 1e-8, less than float32 can hold.
    """
    factors, bases, cores = [delta.left.to(torch.float64), delta.right.T.to(torch.float64)], [], []
    for factor in factors:
        squares, vectors = torch.linalg.eigh(factor.T @ factor)
        if not len(squares) or not squares[0] > RANGE_SAFELY**2 * squares[-1]:
            return None
        values = squares.sqrt()
        bases.append(vectors / values)
        cores.append(values[:, None] * vectors.T)
    left, values, right = torch.linalg.svd(cores[0] @ cores[1].T, full_matrices=False)
    count = count_kept(values, delta.shape, rank, torch.float32)
    parts = zip(factors, bases, (left, right.T), strict=True)
    U, V = ((factor @ (basis @ part[:, :count])).to(torch.float32) for factor, basis, part in parts)
    return SVD(U, values[:count].to(torch.float32), V)


def _reflect(packed: Tensor, scales: Tensor, part: Tensor) -> Tensor:
    """Q [n, k] @ part, Q being the Householder reflections that geqrf returns."""
    padded = part.new_zeros(packed.shape[0], part.shape[1])
    padded[: len(part)] = part
    return torch.ormqr(packed, scales, padded)


def factored_range(delta: LowRank, rule: RankRule | None = None) -> Tensor:
    """[n, k] the left singular vectors alone; several times faster than by QR, which narrow tall matrices make slow.

    L R has those of L C with C C^T = R R^T, found from r x r Gram matrices in float64. Where a singular value is so
    small a share of the largest that squaring it loses digits, by the two QRs after all.
    """
    dtype = torch.promote_types(working_dtype(delta.left), working_dtype(delta.right))
    left, right = delta.left.to(torch.float64), delta.right.to(torch.float64)
    squares, vectors = torch.linalg.eigh(right @ right.T)
    if delta.rank == 0 or not squares[0] > RANGE_SAFELY**2 * squares[-1]:
        return _by_qr(delta, rule)
    root = vectors * squares.sqrt()
    squares, vectors = torch.linalg.eigh(root.T @ (left.T @ left) @ root)
    if not squares[0] > RANGE_SAFELY**2 * squares[-1]:
        return _by_qr(delta, rule)
    values = squares.flip(0).sqrt()
    count = count_kept(values, delta.shape, rule, dtype)
    return (left @ (root @ (vectors.flip(1)[:, :count] / values[:count]))).to(dtype)


def _by_qr(delta: LowRank, rule: RankRule | None) -> Tensor:
    found = factored_svd(delta)
    return found.U[:, : count_kept(found.S, delta.shape, rule, found.S.dtype)]
