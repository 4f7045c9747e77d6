"""Exact weighted sums of changes: added up in float64 and rounded once, in the smallest form that holds them.

Every sum of changes in this package is one of these. mergekit's methods, which add up float32 numbers, have their own
sum in ``tvbases_mergekit``: its results are to be mergekit's to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .blocks import blocks
from .delta import Delta, Dense, Dora, Images, LowRank, Stacked, low_parts, work_dtype


def total(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """sum_i w_i delta_i of one weight, exact up to one rounding, in the smallest form that holds it.

    Low-rank changes put their factors side by side: the rank is the sum of the ranks, except that those which share a
    factor (the same tensor) add up the other one. With DoRA changes of one base among them the row scales add too, and
    the sum is a Dora. Any dense change makes the sum Dense, in float32 at least: O(T n m), block by block.
    """
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if weights == [1.0]:
        return deltas[0]
    terms = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight != 0]
    if len(terms) == 1 and isinstance(terms[0][0], Images):
        return terms[0][0].times(terms[0][1])
    stacks = [(delta, weight) for delta, weight in terms if isinstance(delta, Stacked)]
    if stacks and all(isinstance(d, Stacked) or (isinstance(d, LowRank) and not d.rank) for d, _ in terms):
        lefts, rights = [delta.left * weight for delta, weight in stacks], [delta.right for delta, _ in stacks]
        return Stacked(torch.cat(lefts, dim=2), torch.cat(rights, dim=1))
    scaled = [(delta, weight) for delta, weight in terms if isinstance(delta, Dora)]
    whole = len(low_parts(deltas)) < len(deltas)
    if whole or not all(_is_same(delta.base, scaled[0][0].base) for delta, _ in scaled):
        column = torch.tensor(weights, dtype=torch.float64, device=deltas[0].device)
        return by_entry(deltas, lambda values: column @ values)
    low = _low_rank([(delta.low, weight) for delta, weight in terms if delta.low is not None])
    low = low or LowRank.zeros(deltas[0].shape, deltas[0].device)
    if not scaled:
        return low
    none = torch.zeros(low.shape[0], device=low.device)
    row_scale = sum((weight * delta.row_scale.to(torch.float64) for delta, weight in scaled), none)
    return Dora(row_scale.to(torch.float32), scaled[0][0].base, low)


def scale(delta: Delta, factor: float) -> Delta:
    """``factor`` times the change, in the form it has."""
    return total([delta], [factor])


def mix(deltas: Sequence[Delta], mixing: Tensor) -> list[Delta]:
    """The K sums B = T ``mixing`` of T changes, ``mixing`` [T, K]: bases from task vectors, for one weight.

    Factored changes get one right factor for all K, so that adding the sums up again costs no rank.
    """
    columns, low = mixing.T.tolist(), low_parts(deltas)
    if len(low) < len(deltas):
        return [total(deltas, column) for column in columns]
    right = torch.cat([part.right for part in low], dim=0)
    lefts = [torch.cat([p.left * w for p, w in zip(low, column, strict=True)], dim=1) for column in columns]
    none = LowRank(right.new_zeros(deltas[0].shape[0], 0), right[:0])
    rows = [delta.with_low(lambda _: none) for delta in deltas]
    sums = [LowRank(left, right) for left in lefts]
    return [_with_rows(low, total(rows, column)) for low, column in zip(sums, columns, strict=True)]


def by_entry(deltas: Sequence[Delta], merge: Callable[[Tensor], Tensor]) -> Dense:
    """``merge([T, k]) -> [k]``, both float64, of the T values of every entry, block by block.

    The result has the stored shape and the widest stored dtype, float32 at least.
    """
    whole = [delta.shape for delta in deltas if delta.low is None]
    shape = whole[0] if whole else deltas[0].shape  # a factored convolution is flattened
    merged, start = torch.empty(math.prod(shape), dtype=work_dtype(deltas), device=deltas[0].device), 0
    for part in blocks(deltas):
        merged[start : start + part.shape[1]] = merge(part)
        start += part.shape[1]
    return Dense(merged.reshape(shape))


def side_by_side(terms: Sequence[tuple[LowRank, float]]) -> LowRank:
    """The weighted sum of one or more low-rank changes with the factors of all: its rank is the sum of theirs."""
    lefts = [delta.left * weight if weight != 1 else delta.left for delta, weight in terms]
    return LowRank(torch.cat(lefts, dim=1), torch.cat([delta.right for delta, _ in terms], dim=0))


def _low_rank(terms: Sequence[tuple[LowRank, float]]) -> LowRank | None:
    """Their sum, None of nothing."""
    if len(terms) > 1 and all(delta.left is terms[0][0].left for delta, _ in terms):
        rights = [delta.right * weight if weight != 1 else delta.right for delta, weight in terms]
        return LowRank(terms[0][0].left, sum(rights[1:], rights[0]))
    shared: dict[int, LowRank] = {}
    for delta, weight in terms:
        left = delta.left * weight if weight != 1 else delta.left
        known = shared.get(id(delta.right))
        shared[id(delta.right)] = LowRank(left if known is None else known.left + left, delta.right)
    if len(shared) < 2:
        return next(iter(shared.values()), None)
    return side_by_side([(delta, 1.0) for delta in shared.values()])


def _with_rows(low: LowRank, rows: Delta) -> Delta:
    """``low`` plus a change of rank 0, whose rows are scaled at most; it keeps its right factor."""
    return total([low, rows]) if rows.low is None else rows.with_low(lambda _: low)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; two views of one file are told at once."""
    return (a.data_ptr() == b.data_ptr() and a.shape == b.shape) or torch.equal(a, b)
