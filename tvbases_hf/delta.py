"""One weight's change, in the form it is stored in.

``Dense`` is the difference of two stored tensors, subtracted block by block so that it never has to exist as a whole;
``LowRank`` stays in its factors; ``Dora`` is a low-rank change plus a scaling of the base's rows, kept apart. Every
function here takes any mix of the three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers of all tasks together in one block: float64 work space of a few copies of 32 MB, whatever the tensor's size.
BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Dense:
    """``tuned`` - ``base``, both [*shape] in their stored dtype; ``base`` None means that ``tuned`` is the change."""

    tuned: Tensor
    base: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tuned.shape)

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

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        rows = self.scale[first:last, None].to(torch.float64) * self.base.reshape(self.shape)[first:last].to(
            torch.float64
        )
        return rows.reshape(-1)[start - first * columns : stop - first * columns] + self.low.block(start, stop)


Delta = Dense | LowRank | Dora


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
            return sum((part[0] @ part[1] for part in blocks([a, b])), torch.zeros((), dtype=torch.float64))


def blocks(deltas: Sequence[Delta]) -> Iterator[Tensor]:
    """[T, k] float64 pieces of the flattened deltas, in order; k is bounded by BLOCK_NUMBERS / T."""
    size = math.prod(deltas[0].shape)
    step = max(1, BLOCK_NUMBERS // len(deltas))
    for start in range(0, size, step):
        yield torch.stack([delta.block(start, min(start + step, size)) for delta in deltas])


def delta_gram(deltas: Sequence[Delta]) -> Tensor:
    """[T, T] float64 inner products of T deltas of one weight, in factor space when all are low-rank."""
    count = len(deltas)
    if all(isinstance(delta, LowRank) for delta in deltas):
        gram = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = inner(deltas[i], deltas[j])
        return gram
    return sum((part @ part.T for part in blocks(deltas)), torch.zeros(count, count, dtype=torch.float64))


def dense(delta: Delta, dtype: torch.dtype = torch.float64) -> Tensor:
    """The change as one tensor [*shape] of ``dtype``; differences of stored numbers are taken in float64 first."""
    if isinstance(delta, LowRank):
        return delta.left.to(dtype) @ delta.right.to(dtype)
    return delta.block(0, math.prod(delta.shape)).reshape(delta.shape).to(dtype)
