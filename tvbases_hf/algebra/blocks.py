"""Changes in pieces: what is formed of them at a time, whatever their size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .delta import Delta, Dense

# Numbers of all tasks together in one block: float64 work space of a few copies of 2 MB, whatever the tensor's size.
# Blocks that stay in the processor's cache are several times faster than ones of 32 MB.
BLOCK_NUMBERS = 1 << 18
# On a GPU, which has no such cache and takes a moment to begin with each operation.
GPU_BLOCK_NUMBERS = 1 << 24
# What a thread takes that goes through the pieces of all tasks: a few float64 copies of one.
PIECE_BYTES = 8 * 8 * BLOCK_NUMBERS
# And that writes pieces of bases as well, rounded, with their products (measured: 28 to 48 MB).
ENCODE_BYTES = 5 * PIECE_BYTES // 2


def block_numbers(device: torch.device) -> int:
    """How many numbers of all tasks together are worked on at a time."""
    return BLOCK_NUMBERS if device.type == "cpu" else GPU_BLOCK_NUMBERS


def pieces(delta: Delta, factor: float = 1.0) -> Iterator[Tensor]:
    """``factor`` times the flattened change in consecutive float64 pieces, of whole rows."""
    size, columns = math.prod(delta.shape), delta.shape[-1] if len(delta.shape) > 1 else 1
    step = max(1, block_numbers(delta.device) // max(1, columns)) * columns
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


def is_zero(delta: Delta) -> bool:
    """Whether nothing changes, up to the rounding of what a Dora scales its rows with."""
    if delta.parts is not None:
        return all(map(is_zero, delta.parts))
    if delta.low is None:
        return not any(piece.any() for piece in pieces(delta))
    rows = torch.zeros(()) if delta.row_scale is None else delta.row_scale
    noise = 8 * torch.finfo(torch.float32).eps
    return not (delta.low.left.any() and delta.low.right.any()) and not (rows.abs() > noise).any()
