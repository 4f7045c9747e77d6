"""One weight's change, in the form it is stored in.

``Dense`` is the difference of two stored tensors, subtracted block by block so that it never has to exist as a whole;
``LowRank`` stays in its factors; ``Dora`` is a low-rank change plus a scaling of the base's rows, kept apart. Every
function here, and every sum in ``sums``, takes any mix of the three: nobody needs to ask which one a change is. What a
change has is asked for instead, None where there is none: ``low``, its low-rank part, and ``row_scale``; ``factors``,
the whole change as two factors; ``parts``, the matrices' changes of a stack of factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dtypes import promoted

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
    def factors(self) -> None:
        return None

    @property
    def parts(self) -> None:
        return None

    @property
    def low(self) -> None:
        return None

    @property
    def row_scale(self) -> None:
        return None

    @property
    def T(self) -> Dense:
        return Dense(self.tuned.T, None if self.base is None else self.base.T)

    def to(self, device: torch.device) -> Dense:
        return Dense(self.tuned.to(device), None if self.base is None else self.base.to(device))

    def with_low(self, change: Callable[[LowRank], LowRank]) -> Dense:
        """The same change: there is no low-rank part to replace."""
        return self

    def block(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened change, float64: the difference of the stored numbers is exact."""
        part = self.tuned.reshape(-1)[start:stop].to(torch.float64)
        return part if self.base is None else part - self.base.reshape(-1)[start:stop].to(torch.float64)


@dataclass(frozen=True)
class LowRank:
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
    def parts(self) -> None:
        return None

    @property
    def low(self) -> LowRank:
        return self

    @property
    def row_scale(self) -> None:
        return None

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
class Dora:
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
    def factors(self) -> None:
        return None

    @property
    def parts(self) -> None:
        return None

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
class Stacked:
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
    def factors(self) -> None:
        return None

    @property
    def low(self) -> None:
        return None

    @property
    def row_scale(self) -> None:
        return None

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


Delta = Dense | LowRank | Dora | Stacked


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


def block_numbers(device: torch.device) -> int:
    """How many numbers of all tasks together are worked on at a time."""
    return BLOCK_NUMBERS if device.type == "cpu" else GPU_BLOCK_NUMBERS


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
        yield _rows(deltas, start, min(start + step, size))


def _rows(deltas: Sequence[Delta], start: int, stop: int) -> Tensor:
    """[T, stop - start] float64; a base of several changes is converted once."""
    bases: dict[int, Tensor] = {}
    found = torch.empty(len(deltas), stop - start, dtype=torch.float64, device=deltas[0].device)
    for row, delta in zip(found, deltas, strict=True):
        if not isinstance(delta, Dense) or delta.base is None:
            row.copy_(delta.block(start, stop))
        else:
            known = bases.get(id(delta.base))
            known = delta.base.reshape(-1)[start:stop].to(torch.float64) if known is None else known
            row.copy_(delta.tuned.reshape(-1)[start:stop]).sub_(bases.setdefault(id(delta.base), known))
    return found


def dense(delta: Delta, dtype: torch.dtype = torch.float64) -> Tensor:
    """The change as one tensor [*shape] of ``dtype``; differences are taken in float64, of 16-bit floats in float32."""
    if isinstance(delta, (LowRank, Stacked)):
        return delta.left.to(dtype) @ delta.right.to(dtype)
    if isinstance(delta, Dense) and delta.is_short and dtype == torch.float32:
        change = delta.tuned.to(dtype)
        return change if delta.base is None else change.sub_(delta.base.to(dtype))
    return delta.block(0, math.prod(delta.shape)).reshape(delta.shape).to(dtype)


def is_zero(delta: Delta) -> bool:
    """Whether nothing changes, up to the rounding of what a Dora scales its rows with."""
    if isinstance(delta, Stacked):
        return all(map(is_zero, delta.parts))
    if delta.low is None:
        return not any(piece.any() for piece in pieces(delta))
    rows = torch.zeros(()) if delta.row_scale is None else delta.row_scale
    noise = 8 * torch.finfo(torch.float32).eps
    return not (delta.low.left.any() and delta.low.right.any()) and not (rows.abs() > noise).any()
