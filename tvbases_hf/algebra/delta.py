"""One weight's change, in the form it is stored in.

``Dense`` is the difference of two stored tensors, subtracted block by block so that it never has to exist as a whole;
``LowRank`` stays in its factors; ``Dora`` is a low-rank change plus a scaling of the base's rows, kept apart. Every
function here takes any mix of the three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers of all tasks together in one block: float64 work space of a few copies of 2 MB, whatever the tensor's size.
# Blocks that stay in the processor's cache are several times faster than ones of 32 MB.
BLOCK_NUMBERS = 1 << 18
# On a GPU, which has no such cache and takes a moment to begin with each operation.
GPU_BLOCK_NUMBERS = 1 << 24
# What a thread takes that goes through the pieces of all tasks: a few float64 copies of one.
PIECE_BYTES = 8 * 8 * BLOCK_NUMBERS
# And that writes pieces of bases as well, rounded, with their products (measured: 28 to 48 MB).
ENCODE_BYTES = 5 * PIECE_BYTES // 2


@dataclass(frozen=True)
class Dense:
    """``tuned`` - ``base``, both [*shape] in their stored dtype; ``base`` None means that ``tuned`` is the change."""

    tuned: Tensor
    base: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tuned.shape)

    @property
    def device(self) -> torch.device:
        return self.tuned.device

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64: the difference of the stored numbers is exact."""
        part = self.tuned.reshape(-1)[start:stop].to(torch.float64)
        return part if self.base is None else part - self.base.reshape(-1)[start:stop].to(torch.float64)


@dataclass(frozen=True)
class LowRank:
    """``left`` @ ``right``: [n, r] @ [r, m], the scaling already inside."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.right.shape[1])

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened product, float64; only the rows that hold them are formed."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        rows = self.left[first:last].to(torch.float64) @ self.right.to(torch.float64)
        return rows.reshape(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True)
class Dora:
    """diag(``scale``) ``base`` + ``low``: scale [n] float32, base [n, m] as stored, low a LowRank of that shape.

    A DoRA adapter of magnitude mu changes W to diag(g) (W + s B A) with g = mu / |rows of W + s B A|, which is
    scale = g - 1 and low = diag(g) s B A (Liu et al., 2024, equation 5).
    """

    scale: Tensor
    base: Tensor
    low: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low.shape

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        rows = self.scale[first:last, None].to(torch.float64) * self.base.reshape(self.shape)[first:last].to(
            torch.float64
        )
        return rows.reshape(-1)[start - first * columns : stop - first * columns] + self.low.block(start, stop)


Delta = Dense | LowRank | Dora


def moved(delta: Delta, device: torch.device) -> Delta:
    """The change with all that it holds on ``device``; the same tensors where they are there."""
    match delta:
        case Dense():
            return Dense(delta.tuned.to(device), None if delta.base is None else delta.base.to(device))
        case LowRank():
            return LowRank(delta.left.to(device), delta.right.to(device))
        case _:
            low = LowRank(delta.low.left.to(device), delta.low.right.to(device))
            return Dora(delta.scale.to(device), delta.base.to(device), low)


def block_numbers(device: torch.device) -> int:
    """How many numbers of all tasks together are worked on at a time."""
    return BLOCK_NUMBERS if device.type == "cpu" else GPU_BLOCK_NUMBERS


def inner(a: Delta, b: Delta) -> Tensor:
    """Frobenius inner product <a, b>, float64 scalar.

    Two low-rank deltas of rank r stay factored, O(r^2 (n + m)); with one dense delta it is O(r n m), no dense product.
    """
    match a, b:
        case LowRank(), LowRank():
            left = a.left.to(torch.float64).T @ b.left.to(torch.float64)
            right = a.right.to(torch.float64) @ b.right.to(torch.float64).T
            return (left * right).sum()
        case _:
            zero = torch.zeros((), dtype=torch.float64, device=a.device)
            return sum((part[0] @ part[1] for part in blocks([a, b])), zero)


def pieces(delta: Delta, factor: float = 1.0) -> Iterator[Tensor]:
    """``factor`` times the flattened change in consecutive float64 pieces, whole rows of a factored one."""
    size, columns = math.prod(delta.shape), delta.shape[-1] if delta.shape else 1
    block = block_numbers(delta.device)
    step = block if isinstance(delta, Dense) else max(1, block // max(1, columns)) * columns
    for start in range(0, size, max(1, step)):
        yield factor * delta.block(start, min(start + step, size))


def blocks(deltas: Sequence[Delta]) -> Iterator[Tensor]:
    """[T, k] float64 pieces of the flattened deltas, in order; k is bounded by block_numbers / T."""
    size = math.prod(deltas[0].shape)
    step = max(1, block_numbers(deltas[0].device) // len(deltas))
    for start in range(0, size, step):
        yield torch.stack([delta.block(start, min(start + step, size)) for delta in deltas])


def delta_gram(deltas: Sequence[Delta]) -> Tensor:
    """[T, T] float64 inner products of T deltas of one weight, in factor space when all are low-rank."""
    count = len(deltas)
    gram = torch.zeros(count, count, dtype=torch.float64, device=deltas[0].device)
    if all(isinstance(delta, LowRank) for delta in deltas):
        for i in range(count):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = inner(deltas[i], deltas[j])
        return gram
    return sum((part @ part.T for part in blocks(deltas)), gram)


def dense(delta: Delta, dtype: torch.dtype = torch.float64) -> Tensor:
    """The change as one tensor [*shape] of ``dtype``; differences of stored numbers are taken in float64 first."""
    if isinstance(delta, LowRank):
        return delta.left.to(dtype) @ delta.right.to(dtype)
    return delta.block(0, math.prod(delta.shape)).reshape(delta.shape).to(dtype)


def scale(delta: Delta, factor: float) -> Delta:
    """``factor`` times the change, in the form it has."""
    return add([delta], [factor])


def add(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """sum_i w_i delta_i of one weight, exact up to one rounding, in the smallest form that holds it.

    Low-rank changes put their factors side by side: the rank is the sum of the ranks, except that those which share a
    right factor (the same tensor) add up their left ones. With DoRA changes of one base among them the row scales add
    too, and the sum is a Dora. Any dense change makes the sum Dense, in float32 at least: O(T n m), block by block.
    """
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if list(weights) == [1.0]:
        return deltas[0]
    terms = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight != 0]
    low = [(d.low if isinstance(d, Dora) else d, weight) for d, weight in terms]
    factored = [(d, weight) for d, weight in low if isinstance(d, LowRank)]
    if len(factored) < len(terms) or not all(isinstance(delta, (LowRank, Dora)) for delta in deltas):
        return _add_dense(deltas, weights)
    total = _add_low_rank(factored, deltas[0])
    scaled = [(delta, weight) for delta, weight in terms if isinstance(delta, Dora)]
    if not scaled:
        return total
    base = scaled[0][0].base
    if not all(_is_same(delta.base, base) for delta, _ in scaled):
        return _add_dense(deltas, weights)
    none = torch.zeros(total.shape[0], device=total.device)
    rows = sum((weight * delta.scale.to(torch.float64) for delta, weight in scaled), none)
    return Dora(rows.to(torch.float32), base, total)


def mix(deltas: Sequence[Delta], mixing: Tensor) -> list[Delta]:
    """The K sums B = T ``mixing`` of T changes, ``mixing`` [T, K]: bases from task vectors, for one weight.

    Factored changes get one right factor for all K, so that adding the sums up again costs no rank.
    """
    columns = mixing.T.tolist()
    low = [delta.low if isinstance(delta, Dora) else delta for delta in deltas]
    factored = [delta for delta in low if isinstance(delta, LowRank)]
    if len(factored) < len(deltas):
        return [add(deltas, column) for column in columns]
    right = torch.cat([delta.right for delta in factored], dim=0)
    sums = [
        LowRank(torch.cat([d.left * w for d, w in zip(factored, column, strict=True)], dim=1), right)
        for column in columns
    ]
    none = LowRank(right.new_zeros(deltas[0].shape[0], 0), right[:0])
    rows = [Dora(d.scale, d.base, none) if isinstance(d, Dora) else none for d in deltas]
    return [_with_rows(total, add(rows, column)) for total, column in zip(sums, columns, strict=True)]


def square_norm(delta: Delta) -> float:
    """|delta|_F^2, in factor space for a low-rank change; never negative."""
    return float(inner(delta, delta).clamp_min(0))


def _add_low_rank(terms: Sequence[tuple[LowRank, float]], like: Delta) -> LowRank:
    lefts: dict[int, Tensor] = {}
    rights: dict[int, Tensor] = {}
    for delta, weight in terms:
        key, left = id(delta.right), delta.left * weight if weight != 1 else delta.left
        lefts[key] = lefts[key] + left if key in lefts else left
        rights[key] = delta.right
    if not terms:
        none = torch.zeros(like.shape[0], 0, device=like.device)
        return LowRank(none, none.new_zeros(0, like.shape[1]))
    if len(lefts) == 1:
        return LowRank(*lefts.values(), *rights.values())
    return LowRank(torch.cat(list(lefts.values()), dim=1), torch.cat(list(rights.values()), dim=0))


def _with_rows(low: LowRank, rows: Delta) -> Delta:
    """``low`` plus a change of rank 0, whose rows are scaled at most; it keeps its right factor."""
    match rows:
        case LowRank():
            return low
        case Dora():
            return Dora(rows.scale, rows.base, low)
        case _:
            return add([low, rows])


def _add_dense(deltas: Sequence[Delta], weights: Sequence[float]) -> Dense:
    stored = [delta.tuned for delta in deltas if isinstance(delta, Dense)]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in stored], torch.float32)
    shape = stored[0].shape if stored else deltas[0].shape  # a factored convolution is flattened
    total = torch.empty(math.prod(shape), dtype=dtype, device=deltas[0].device)
    coefficients, start = torch.tensor(weights, dtype=torch.float64, device=total.device), 0
    for part in blocks(deltas):
        total[start : start + part.shape[1]] = coefficients @ part
        start += part.shape[1]
    return Dense(total.reshape(shape))


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; two views of one file are told at once."""
    return (a.data_ptr() == b.data_ptr() and a.shape == b.shape) or torch.equal(a, b)
