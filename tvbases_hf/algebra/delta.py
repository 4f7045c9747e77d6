"""One weight's change, in the form it is stored in.

``Dense`` is the difference of two stored tensors, subtracted block by block so that it never has to exist as a whole;
``LowRank`` stays in its factors, as the many of ``Stacked`` do; ``Dora`` is a low-rank change plus a scaling of the
base's rows, kept apart; ``Images`` is made of the rows of stored changes when it is read. Every function here, and
every sum in ``sums``, takes any mix of them: nobody needs to ask which one a change is. What a
change has is asked for instead, None where there is none: ``low``, its low-rank part, and ``row_scale``; ``factors``,
the whole change as two factors; ``parts``, the matrices' changes of a stack of factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dtypes import promoted


class _Change:
    """What only some changes have: None of the others."""

    @property
    def factors(self) -> LowRank | None:
        return None

    @property
    def parts(self) -> list[LowRank] | None:
        return None


class _Whole(_Change):
    """Without a low-rank part to ask for, or rows that are scaled."""

    @property
    def low(self) -> None:
        return None

    @property
    def row_scale(self) -> None:
        return None


@dataclass(frozen=True)
class Dense(_Whole):
    """``tuned`` - ``base``, both [*shape] in their stored dtype; ``base`` None means that ``tuned`` is the change."""

    tuned: Tensor
    base: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tuned.shape)

    @property
    def device(self) -> torch.device:
        return self.tuned.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tuned.dtype

    @property
    def is_short(self) -> bool:
        """Whether float32 holds the stored numbers with digits to spare: they are floats of 16 bits or eight."""
        return all(x.is_floating_point() and x.dtype.itemsize <= 2 for x in (self.tuned, self.base) if x is not None)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold the change, beside those of the base."""
        return (self.tuned,)

    @property
    def T(self) -> Dense:
        return Dense(self.tuned.T, None if self.base is None else self.base.T)

    def to(self, device: torch.device) -> Dense:
        return Dense(self.tuned.to(device), None if self.base is None else self.base.to(device))

    def rows(self, start: int, stop: int) -> Dense:
        """Of the change, those from start to stop."""
        return Dense(self.tuned[start:stop], None if self.base is None else self.base[start:stop])

    def with_low(self, change: Callable[[LowRank], LowRank]) -> Dense:
        """The same change: there is no low-rank part to replace."""
        return self

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64: the difference of the stored numbers is exact."""
        part = self.tuned.reshape(-1)[start:stop].to(torch.float64)
        return part if self.base is None else part - self.base.reshape(-1)[start:stop].to(torch.float64)


@dataclass(frozen=True)
class LowRank(_Change):
    """``left`` @ ``right``: [n, r] @ [r, m], the scaling already inside."""

    left: Tensor
    right: Tensor

    @staticmethod
    def zeros(shape: Sequence[int], device: torch.device | None = None) -> LowRank:
        """No change of a matrix, at rank 0."""
        rows, columns = shape
        return LowRank(torch.zeros(rows, 0, device=device), torch.zeros(0, columns, device=device))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.right.shape[1])

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.left, self.right)

    @property
    def factors(self) -> LowRank:
        return self

    @property
    def row_scale(self) -> None:
        return None

    @property
    def low(self) -> LowRank:
        return self

    @property
    def T(self) -> LowRank:
        return LowRank(self.right.T, self.left.T)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LowRank:
        return LowRank(self.left.to(device, dtype), self.right.to(device, dtype))

    def with_low(self, change: Callable[[LowRank], LowRank]) -> LowRank:
        """``change`` of its low-rank part, which it is as a whole."""
        return change(self)

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened product, float64; only the rows that hold them are formed."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        rows = self.left[first:last].to(torch.float64) @ self.right.to(torch.float64)
        return rows.reshape(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True)
class Dora(_Change):
    """diag(``row_scale``) ``base`` + ``low``: row_scale [n] float32, base [n, m] as stored, low of that shape.

    A DoRA adapter of magnitude mu changes W to diag(g) (W + s B A) with g = mu / |rows of W + s B A|, which is
    row_scale = g - 1 and low = diag(g) s B A (Liu et al., 2024, equation 5).
    """

    row_scale: Tensor
    base: Tensor
    low: LowRank

    @classmethod
    def of(cls, product: LowRank, magnitude: Tensor, base: Tensor) -> Dora:
        """diag(g) (W + s B A) - W of ``product`` s B A [n, m], magnitude [n], and W with m numbers in a row."""
        updated = base.reshape(product.shape).to(product.left.dtype) + product.left @ product.right
        factor = magnitude / updated.norm(dim=1)
        return cls(factor - 1, base, LowRank(factor[:, None] * product.left, product.right))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low.shape

    @property
    def device(self) -> torch.device:
        return self.row_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.row_scale.dtype

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.row_scale, *self.low.stored)

    @property
    def T(self) -> Dense:
        """Whole, float32: its columns are scaled, for which there is no form."""
        return Dense(dense(self, torch.float32).T)

    def to(self, device: torch.device) -> Dora:
        return Dora(self.row_scale.to(device), self.base.to(device), self.low.to(device))

    def with_low(self, change: Callable[[LowRank], LowRank]) -> Dora:
        """With ``change`` of its low-rank part; its rows are scaled as before."""
        return Dora(self.row_scale, self.base, change(self.low))

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        base = self.base.reshape(self.shape)[first:last].to(torch.float64)
        rows = self.row_scale[first:last, None].to(torch.float64) * base
        return rows.reshape(-1)[start - first * columns : stop - first * columns] + self.low.block(start, stop)


@dataclass(frozen=True)
class Stacked(_Whole):
    """``left`` [E, n, r] times ``right`` [E, r, m]: the low-rank changes of E matrices in one tensor [E, n, m]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:2], self.right.shape[2])

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.left, self.right)

    @property
    def T(self) -> Stacked:
        """Each matrix transposed."""
        return Stacked(self.right.mT, self.left.mT)

    @property
    def parts(self) -> list[LowRank]:
        """The changes of the matrices."""
        return [LowRank(left, right) for left, right in zip(self.left, self.right, strict=True)]

    def to(self, device: torch.device) -> Stacked:
        return Stacked(self.left.to(device), self.right.to(device))

    def with_low(self, change: Callable[[LowRank], LowRank]) -> Stacked:
        """With ``change`` of every matrix's change, padded with zeros to one rank."""
        return Stacked.of([change(part) for part in self.parts])

    @staticmethod
    def of(parts: Sequence[LowRank]) -> Stacked:
        """The changes of E matrices, padded with zeros to one rank."""
        rank = max(part.rank for part in parts)
        left = [torch.nn.functional.pad(part.left, (0, rank - part.rank)) for part in parts]
        right = [torch.nn.functional.pad(part.right, (0, 0, 0, rank - part.rank)) for part in parts]
        return Stacked(torch.stack(left), torch.stack(right))

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64; only the matrices that hold them are formed."""
        _, n, m = self.shape
        first, last = start // (n * m), math.ceil(stop / (n * m))
        parts = [part.block(0, n * m) for part in self.parts[first:last]] or [torch.empty(0, dtype=torch.float64)]
        return torch.cat(parts)[start - first * n * m : stop - first * n * m]


@dataclass(frozen=True)
class Images(_Whole):
    """[D_1 P_1, ..., D_T P_T] ``right``, float32: the rows of stored changes D_i [n, m] times ``maps`` P_i [m, k_i].

    For a left factor [n, r] that is as large as the change itself: ``right`` is [r, m], and rows are made as they are
    read.
    """

    deltas: tuple[Dense, ...]
    maps: tuple[Tensor, ...]
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.deltas[0].shape[0], self.right.shape[1])

    @property
    def device(self) -> torch.device:
        return self.right.device

    @property
    def dtype(self) -> torch.dtype:
        return self.right.dtype

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (*(delta.tuned for delta in self.deltas), *self.maps, self.right)

    @property
    def T(self) -> Dense:
        """Whole, float32."""
        return Dense(dense(self, torch.float32).T)

    def to(self, device: torch.device) -> Images:
        moved = tuple(delta.to(device) for delta in self.deltas)
        return Images(moved, tuple(part.to(device) for part in self.maps), self.right.to(device))

    def with_low(self, change: Callable[[LowRank], LowRank]) -> Images:
        """The same change: there is no low-rank part to replace."""
        return self

    def times(self, factor: float) -> Images:
        return Images(self.deltas, self.maps, self.right * factor)

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64; only the rows that hold them are formed."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        own = [dense(delta.rows(first, last), torch.float32) for delta in self.deltas]
        images = [rows @ part for rows, part in zip(own, self.maps, strict=True)]
        found = (torch.cat(images, dim=1) @ self.right).to(torch.float64)
        return found.reshape(-1)[start - first * columns : stop - first * columns]


Delta = Dense | LowRank | Dora | Stacked | Images


def zeros(shape: Sequence[int], device: torch.device | None = None) -> LowRank | Dense:
    """No change, at rank 0 of a matrix."""
    return LowRank.zeros(shape, device) if len(shape) == 2 else Dense(torch.zeros(tuple(shape), device=device))


def reshaped(delta: Delta, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Delta:
    """The change in the shape of its weight: factors of a convolution, which make a matrix, as a whole tensor."""
    return delta if delta.shape == tuple(shape) else Dense(dense(delta, dtype).reshape(*shape))


def matrix_of(delta: Delta, index: int) -> Dense | LowRank:
    """The change of one matrix of a weight [E, n, m]."""
    match delta:
        case Stacked():
            return LowRank(delta.left[index], delta.right[index])
        case Dense():
            return Dense(delta.tuned[index], None if delta.base is None else delta.base[index])
    raise ValueError(f"a change of shape {list(delta.shape)} is one matrix")


def low_parts(deltas: Sequence[Delta]) -> list[LowRank]:
    """The low-rank parts of those changes that have one."""
    return [delta.low for delta in deltas if delta.low is not None]


def work_dtype(deltas: Sequence[Delta]) -> torch.dtype:
    """Of a result that is formed of whole changes: the widest that one of them is stored in, float32 at least."""
    stored = [delta.dtype for delta in deltas if isinstance(delta, Dense)]
    return promoted(torch.float32, *stored)


def dense(delta: Delta, dtype: torch.dtype = torch.float64) -> Tensor:
    """The change as one tensor [*shape] of ``dtype``; differences are taken in float64, of 16-bit floats in float32."""
    if isinstance(delta, (LowRank, Stacked)):
        return delta.left.to(dtype) @ delta.right.to(dtype)
    if isinstance(delta, Dense) and delta.is_short and dtype == torch.float32:
        change = delta.tuned.to(dtype)
        return change if delta.base is None else change.sub_(delta.base.to(dtype))
    return delta.block(0, math.prod(delta.shape)).reshape(delta.shape).to(dtype)
