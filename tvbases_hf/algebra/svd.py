"""Truncated singular value decompositions: exact, fast with an error estimate, and of products that stay factored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ParameterError
from .delta import Delta, LowRank, dense
from .linalg import negligible, working_dtype
from .rank import RankRule

# The fast route stops when |A v - sigma u| is below this share of sigma for every component: the result is then an
# exact SVD of a matrix that close to A (relative to |S|_F), and where the spectrum has a gap at the cut every direction
# is that accurate. Small components must be, too, since TSV-Merge gives all directions the same weight.
FAST_TOLERANCE = 3e-5
# It pays when few components of a large matrix are wanted; it gives up when its basis outgrows this share of the side.
FAST_MIN_SIDE = 512
FAST_MAX_RANK = 1 / 12
FAST_MAX_BASIS = 1 / 2
OVERSAMPLING = 8
# Singular values above this share of the largest keep more than float32's digits when squared in float64.
SQUARED_SAFELY = 1e-3
# Singular values above this share leave their vectors an error of 1e-8 when squared in float64.
RANGE_SAFELY = 1e-4


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


def svd(delta: Delta | Tensor, rank: str | float | RankRule | None = None, *, route: str = "auto") -> SVD:
    """The leading singular components of a matrix, or of a low-rank delta in factor space.

    Args:
        delta: [n, m]; a dense change is computed in float32, a tensor in its own dtype, float32 at least.
        rank: a rank rule; None for all components. Fewer where the rest is rounding noise, none of a zero matrix.
        route: ``exact``, ``fast`` (falls back to exact where its error estimate does not converge) or ``auto``.
    """
    if route not in ("auto", "exact", "fast"):
        raise ParameterError(f"unknown route {route!r}; choose auto, exact or fast")
    rule = None if rank is None else RankRule.parse(rank)
    if isinstance(delta, LowRank):
        return factored_svd(delta, rule)
    if len(delta.shape) != 2:
        raise ParameterError(f"a singular value decomposition needs a matrix; got shape {list(delta.shape)}")
    matrix = delta if isinstance(delta, Tensor) else dense(delta, torch.float32)
    if rule is not None and not rule.needs_spectrum:
        count = rule.of_shape(*matrix.shape)
        if route == "fast" or (route == "auto" and _is_worth_it(matrix, count)):
            found = fast_svd(matrix, count)
            if found is not None:
                return found
    return exact_svd(matrix, rule)


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
        return SVD(left, values, right.T).keep(_count(values, matrix.shape, rank, dtype))
    squares, left = torch.linalg.eigh(exact @ exact.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    count = _count(values, matrix.shape, rank, dtype)
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
    if isinstance(delta, LowRank):
        return factored_svd(delta).S.to(torch.float64)
    matrix = delta.to(torch.float64) if isinstance(delta, Tensor) else dense(delta)
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0).sqrt()


def fast_svd(matrix: Tensor, rank: int, *, tolerance: float = FAST_TOLERANCE) -> SVD | None:
    """Block subspace iteration that keeps all its iterates (block Krylov); None where it does not converge.

    After every step the residual A V - U S is known without another product, since A A^T of the basis is at hand.
    It falls quickly for decaying spectra and hardly at all for flat ones, where the exact route is the faster one.
    """
    if matrix.shape[0] > matrix.shape[1]:
        found = fast_svd(matrix.T, rank, tolerance=tolerance)
        return None if found is None else found.transposed()
    matrix = matrix.to(working_dtype(matrix))
    side, width = matrix.shape[0], rank + OVERSAMPLING
    limit = int(FAST_MAX_BASIS * side)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    block = torch.linalg.qr(matrix @ start).Q
    basis, images, squares = block, matrix.T @ block, None
    residuals: list[float] = []
    while True:
        applied = matrix @ images[:, -block.shape[1] :]
        squares = applied if squares is None else torch.cat([squares, applied], dim=1)
        found, residual = _ritz(basis, images, squares, rank)
        if residual <= tolerance:
            return found
        residuals.append(residual)
        steps_left = (limit - basis.shape[1]) // width
        if steps_left < 1 or _is_hopeless(residuals, steps_left, tolerance):
            return None
        block = _orthogonal_to(basis, applied)
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, matrix.T @ block], dim=1)


def _is_hopeless(residuals: Sequence[float], steps_left: int, tolerance: float) -> bool:
    """Whether the steps that fit will not do. Convergence sets in slowly and gets faster: the last rate is squared."""
    if len(residuals) < 3:
        return False
    rate = (residuals[-1] / residuals[-2]) ** 2
    return not residuals[-1] * rate**steps_left <= tolerance


def _ritz(basis: Tensor, images: Tensor, squares: Tensor, rank: int) -> tuple[SVD, float]:
    """Best singular triplets within the basis [n, D], given A^T basis and A A^T basis, and their largest residual."""
    exact = images.to(torch.float64)
    values, vectors = torch.linalg.eigh(exact.T @ exact)
    values = values[-rank:].flip(0).clamp_min(0).sqrt()
    count = _count(values, (basis.shape[0], images.shape[0]), None, basis.dtype)
    if count == 0:
        return SVD(basis[:, :0], values[:0].to(basis.dtype), images[:, :0]), 0.0
    weights, scale = vectors.flip(1)[:, :count].to(basis.dtype), values[:count].to(basis.dtype)
    left, right = basis @ weights, (images @ weights) / scale
    residual = (squares @ weights) / scale / scale - left
    return SVD(left, scale, right), float(residual.norm(dim=0).max())


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns spanning ``block`` without ``basis``; twice, because once is not enough in floating point."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def factored_svd(delta: LowRank, rank: RankRule | None = None) -> SVD:
    """SVD of left @ right by two thin QRs and one small SVD in float64: O((n + m) r^2), never n x m.

    left right = Q_l (R_l R_r^T) Q_r^T. The orthogonal factors stay Householder reflections and are applied only to the
    singular vectors of the core that are kept: with few of them, a third of the cost of forming Q_l and Q_r.
    """
    dtype = torch.promote_types(working_dtype(delta.left), working_dtype(delta.right))
    reflected = [torch.geqrf(factor.to(torch.float64)) for factor in (delta.left, delta.right.T)]
    cores = [packed[: min(packed.shape)].triu() for packed, _ in reflected]
    left, values, right = torch.linalg.svd(cores[0] @ cores[1].T, full_matrices=False)
    count = _count(values, delta.shape, rank, dtype)
    U, V = (
        _reflect(packed, scales, part[:, :count]).to(dtype)
        for (packed, scales), part in zip(reflected, (left, right.T), strict=True)
    )
    return SVD(U, values[:count].to(dtype), V)


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
    count = _count(values, delta.shape, rule, dtype)
    return (left @ (root @ (vectors.flip(1)[:, :count] / values[:count]))).to(dtype)


def _by_qr(delta: LowRank, rule: RankRule | None) -> Tensor:
    found = factored_svd(delta)
    return found.U[:, : _count(found.S, delta.shape, rule, found.S.dtype)]


def _count(values: Tensor, shape: Sequence[int], rule: RankRule | None, dtype: torch.dtype) -> int:
    """How many of the descending singular values a rule keeps; never those that are rounding noise."""
    significant = values[values > negligible(shape, dtype) * values[:1]]
    if rule is None or len(significant) == 0:
        return len(significant)
    wanted = rule.of_spectrum(significant, *shape) if rule.needs_spectrum else rule.of_shape(*shape)
    return min(wanted, len(significant))


def _is_worth_it(matrix: Tensor, rank: int) -> bool:
    side = min(matrix.shape)
    return working_dtype(matrix) == torch.float32 and side >= FAST_MIN_SIDE and rank <= FAST_MAX_RANK * side
