"""Changes turned into rows: shared directions rounded first, then what each task has of them, fitted to the rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from .bits import BITS, dequantise, encode_stack, quantise
from .forms import ALONE, BOTH, Form, Part, counts_of, shared_counts

# Added to the squares of rounded directions, as a share of the largest, before they are divided by.
RIDGE = 1e-10


@dataclass(frozen=True)
class Rows:
    """The rows of T tasks: codes and scales by task, [T, K, d] as they come back."""

    codes: list[bytes]
    scales: list[bytes]
    values: Tensor


@dataclass(frozen=True)
class Codes:
    """What is stored of one weight of one cluster: of the shared directions, ``shared_counts`` [2, 3], and of T tasks,
    ``counts`` [T, 3]."""

    shared_codes: bytes
    shared_scales: bytes
    shared_counts: Tensor
    codes: list[bytes]
    scales: list[bytes]
    counts: Tensor


@dataclass(frozen=True)
class Coded:
    """One weight of one cluster, rounded: ``stored``, and what comes back from it.

    ``left`` [n, R] and ``right`` [R', m] are the shared directions, None for the identity; ``lost`` [T] float64 squared
    errors. Change t is about made[t].left @ made[t].right.
    """

    stored: Codes
    left: Tensor | None
    right: Tensor | None
    outer: Tensor
    inner: Tensor
    lost: Tensor

    def total(self, shares: Tensor) -> LowRank:
        """The sum of the tasks' changes, each times its share, as factors."""
        rows = shares.to(self.inner.dtype)[:, None, None] * self.inner
        if self.outer.ndim == 2:  # one left factor for all
            left, middle = self.outer, rows.sum(0)
        elif self.right is not None:
            left, middle = (self.outer @ rows).sum(0), None
        else:
            left, middle = self.outer.transpose(0, 1).flatten(1), rows.flatten(0, 1)
        if self.right is None:
            assert middle is not None
            return LowRank(left, middle)
        return LowRank(left if middle is None else left @ middle, self.right)

    def made(self, task: int) -> LowRank:
        """One task's change as it comes back."""
        left = self.outer if self.outer.ndim == 2 else self.outer[task]
        right = self.inner[task]
        return LowRank(left, right if self.right is None else right @ self.right)


def encode_part(part: Part, form: Form, price: float, allowed: Sequence[int]) -> Coded:
    """Round one weight of one cluster at a price per byte."""
    found = shared_counts(part, form, price, allowed)
    axes = (None, None) if form.kind == ALONE else part.axes
    sides = [
        encode_stack(axis[:, : sum(counts)].T.contiguous(), counts) if axis is not None and sum(counts) else None
        for axis, counts in zip(axes, found, strict=True)
    ]
    left, right = (None if side is None else side[2] for side in sides)
    codes = b"".join(_bytes(side[0]) for side in sides if side is not None)
    scales = b"".join(_bytes(side[1]) for side in sides if side is not None)
    counts = counts_of(part, form, price, allowed)
    return encode_cores(part, form, counts, left, right, codes, scales, torch.tensor(found))


def encode_cores(
    part: Part,
    form: Form,
    counts: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    shared_codes: bytes = b"",
    shared_scales: bytes = b"",
    shared: Tensor | None = None,
) -> Coded:
    """The tasks' rows between shared directions ``left`` [R, n] and ``right`` [R', m] that are rounded already."""
    b, a = part.change.left, part.change.right
    none = torch.zeros(2, len(BITS), dtype=torch.int64)
    common = none if shared is None else shared
    transposed = None if left is None else left.T
    if not counts.any():
        empty, nothing = [b""] * len(part), (b[:, :, :0], a[:, :0, :] if right is None else a[:, :0, : len(right)])
        stored = Codes(shared_codes, shared_scales, common, empty, empty, counts)
        return Coded(stored, transposed, right, *nothing, part.squares)
    inside = a if right is None else (a @ right.T) @ _inverse(right @ right.T)  # [T, r, d], the changes' right sides
    stacks = []
    if form.kind == BOTH:
        assert left is not None
        outer = left.T[:, : int(counts.sum(1).max())]
        fitted = _inverse(left @ left.T) @ (left @ b)
    else:
        base = b if left is None else _inverse(left @ left.T) @ (left @ b)
        first = encode_rows(_left_factor(base, inside, int(counts.sum(1).max())).mT.contiguous(), counts)
        stacks.append(first)
        outer = first.values.mT if left is None else left.T @ first.values.mT  # [T, n, K]
        square = outer.mT @ outer
        fitted = _inverse(square + torch.diag_embed((square.diagonal(dim1=1, dim2=2) == 0).float())) @ (outer.mT @ b)
    last = encode_rows(fitted @ inside, counts)
    stacks.append(last)
    codes = [b"".join(parts) for parts in zip(*(stack.codes for stack in stacks), strict=True)]
    scales = [b"".join(parts) for parts in zip(*(stack.scales for stack in stacks), strict=True)]
    stored = Codes(shared_codes, shared_scales, common, codes, scales, counts)
    return Coded(stored, transposed, right, outer, last.values, _lost(part, outer, last.values, right))


def encode_rows(rows: Tensor, counts: Tensor) -> Rows:
    """[T, K, d] rows of T tasks, the first counts[t, 0] of task t in 16 bits and so on; the others are left out."""
    most = int(counts.sum(1).max()) if len(counts) else 0
    rows = rows[:, :most]
    tasks, size = len(rows), rows.shape[2]
    codes: list[list[bytes]] = [[] for _ in range(tasks)]
    scales: list[list[bytes]] = [[] for _ in range(tasks)]
    back, place = torch.zeros_like(rows), torch.arange(rows.shape[1])
    start = torch.zeros(tasks, 1, dtype=torch.int64)
    for column, bits in enumerate(BITS):
        stop = start + counts[:, column : column + 1]
        chosen = (place >= start) & (place < stop)
        if bool(chosen.any()):
            found, scale = quantise(rows[chosen], bits)
            back[chosen] = dequantise(found, scale, size, bits)
            data, marks, at = found.numpy(), scale.view(torch.int16).numpy(), 0
            for task, count in enumerate(counts[:, column].tolist()):
                if count:
                    codes[task].append(data[at : at + count].tobytes())
                    scales[task].append(marks[at : at + count].tobytes())
                    at += count
        start = stop
    return Rows([b"".join(own) for own in codes], [b"".join(own) for own in scales], back)


def _left_factor(b: Tensor, a: Tensor, count: int) -> Tensor:
    """[T, n, count] U sqrt(S) of the singular components of each b[t] @ a[t], largest first."""
    values, vectors = torch.linalg.eigh((a @ a.mT).double())
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    inner = root.mT @ (b.mT @ b).double() @ root
    squares, turned = torch.linalg.eigh(inner)
    squares, turned = squares.flip(1)[:, :count].clamp_min(0), turned.flip(2)[:, :, :count]
    scale = torch.where(squares > 0, squares.clamp_min(1e-60) ** -0.25, torch.zeros_like(squares))
    found = b @ (root @ turned * scale[:, None, :]).to(b.dtype)
    return torch.nn.functional.pad(found, (0, count - found.shape[2]))


def _inverse(square: Tensor) -> Tensor:
    """Of a positive semidefinite matrix, or several; float32, by float64."""
    if not square.numel():
        return square
    exact = square.double()
    top = exact.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    one = torch.eye(exact.shape[-1], dtype=exact.dtype)
    return torch.linalg.inv(exact + (RIDGE * top + 1e-60) * one).to(square.dtype)


def _lost(part: Part, outer: Tensor, inner: Tensor, right: Tensor | None) -> Tensor:
    """[T] float64 squared norms of what outer @ inner @ right misses of the changes."""
    b, a = part.change.left, part.change.right
    images = a if right is None else a @ right.T
    cross = ((outer.mT @ b).double() * (images @ inner.mT).double().mT).sum((1, 2))
    square = inner @ inner.mT if right is None else inner @ (right @ right.T) @ inner.mT
    own = ((outer.mT @ outer).double() * square.double()).sum((1, 2))
    return (part.squares - 2 * cross + own).clamp_min(0)


def _bytes(tensor: Tensor) -> bytes:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()
