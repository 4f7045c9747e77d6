"""Inner products of changes: exact in float64, in factor space where they have factors; of long ones in float32 pieces.

A float32 product of short pieces, added up in float64, keeps what a Gram matrix needs, three times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import blocks
from .delta import Delta, Dense, dense

# So many products are added in float32 at a time: of a million numbers the sum is then known to 2e-8.
PIECE = 256
# Of all rows together in one step: in float32 they stay in the processor's second cache.
STEP_NUMBERS = 1 << 17
# Shorter tensors take no time in float64 either.
MIN_NUMBERS = 1 << 20
# Means of squares below this lose digits in float32's range; so does nothing that is a weight's change.
LEAST_SQUARE = 1e-25


def premultiplied(matrix: Tensor, delta: Delta) -> Tensor:
    """``matrix`` [s, n] times the change [n, m], in the matrix's dtype: O(s r (n + m)) for a low-rank one."""
    if (low := delta.factors) is not None:
        return (matrix @ low.left.to(matrix.dtype)) @ low.right.to(matrix.dtype)
    return matrix @ dense(delta).to(matrix.dtype)


def inner(a: Delta, b: Delta) -> Tensor:
    """Frobenius inner product <a, b>, float64 scalar.

    Two low-rank deltas of rank r stay factored, O(r^2 (n + m)); with one dense delta it is O(r n m), no dense product.
    """
    low, other = a.factors, b.factors
    if low is not None and other is not None:
        left = low.left.to(torch.float64).T @ other.left.to(torch.float64)
        right = low.right.to(torch.float64) @ other.right.to(torch.float64).T
        return (left * right).sum()
    zero = torch.zeros((), dtype=torch.float64, device=a.device)
    return sum((part[0] @ part[1] for part in blocks([a, b])), zero)


def gram(deltas: Sequence[Delta]) -> Tensor:
    """[T, T] float64 inner products of T deltas of one weight, in factor space when all are low-rank."""
    count = len(deltas)
    products = torch.zeros(count, count, dtype=torch.float64, device=deltas[0].device)
    if all(delta.factors is not None for delta in deltas):
        for i in range(count):
            for j in range(i + 1):
                products[i, j] = products[j, i] = inner(deltas[i], deltas[j])
        return products
    return sum((part @ part.T for part in blocks(deltas)), products)


def square_norm(delta: Delta) -> float:
    """|delta|_F^2, in factor space for a low-rank change; never negative."""
    return float(inner(delta, delta).clamp_min(0))


def square_distance(a: Delta, b: Delta) -> tuple[float, float]:
    """|a - b|_F^2 and |a|_F^2; in factor space where both scale rows alike, 1e-16 of the latter being noise."""
    alike = a.row_scale is b.row_scale
    if a is b or (alike and a.low is not None and a.low is b.low):
        return 0.0, square_norm(a)
    if a.low is None or b.low is None or not alike:
        return float(sum((x - y).square().sum() for x, y in blocks([a, b]))), square_norm(a)
    left = torch.cat([part.left.to(torch.float64) for part in (a.low, b.low)], dim=1)
    right = torch.cat([part.right.to(torch.float64) for part in (a.low, b.low)], dim=0)
    products, rank = (left.T @ left) * (right @ right.T), a.low.rank
    signs = torch.ones(len(products), dtype=torch.float64)
    signs[rank:] = -1
    own = max(0.0, float(products[:rank, :rank].sum())) if a.row_scale is None else square_norm(a)
    return max(0.0, float(signs @ products @ signs)), own


def float32_products(deltas: Sequence[Delta], base: Tensor) -> Tensor | None:
    """[T + 1, T + 1] float64 inner products of T changes of ``base``, and of base itself: the last row and column.

    Three times as fast as in float64. None for what is not many differences of 16-bit floats in a CPU's memory, whose
    conversion and subtraction float32 does without loss, and where a square is out of float32's range.
    """
    short = [delta for delta in deltas if isinstance(delta, Dense) and delta.is_short and delta.base is base]
    size, rows = base.numel(), len(deltas) + 1
    if len(short) < len(deltas) or size < MIN_NUMBERS or base.device.type != "cpu":
        return None
    step = STEP_NUMBERS // rows // PIECE * PIECE
    if not step:
        return None
    flat = [tensor.reshape(-1) for tensor in (*(delta.tuned for delta in short), base)]
    found, block = torch.zeros(rows, rows, dtype=torch.float64), torch.zeros(rows, step)
    pieces = block.view(rows, -1, PIECE).transpose(0, 1)
    for start in range(0, size, step):
        count = min(step, size - start)
        own = block[-1, :count].copy_(flat[-1][start : start + count])
        for row, tuned in zip(block[:-1, :count], flat, strict=False):
            row.copy_(tuned[start : start + count]).sub_(own)
        block[:, count:] = 0
        found += torch.bmm(pieces, pieces.mT).sum(dim=0, dtype=torch.float64)
    known = torch.isfinite(found).all() and (found.diagonal() > LEAST_SQUARE * size).all()
    return found if known else None
