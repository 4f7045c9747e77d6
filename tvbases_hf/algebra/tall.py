"""Matrices with many more rows than columns, as embeddings are: decomposed from their rows, block by block.

All that is needed of D [n, m] is D^T D [m, m] and what small matrices make of its rows: U = D V S^-1 is never formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .components import count_kept
from .delta import Delta, Dense, dense
from .rank import RankRule

# So many times more rows than columns, and so many numbers: below, a matrix and its factors fit in memory.
TALL, LARGE = 8, 1 << 26
# Of one block of rows: products of this size are as fast as large ones.
BLOCK_NUMBERS = 1 << 20
# Down to which share of the largest eigenvalue of D^T D those that are kept are exact enough, by the dtype of products.
KNOWN = {torch.float32: 1e-3, torch.float64: 1e-6}


def by_rows(deltas: Sequence[Delta]) -> list[Dense]:
    """The changes if all are stored whole and tall and large; else none of them."""
    stored = [delta for delta in deltas if isinstance(delta, Dense) and is_tall(delta.shape)]
    return stored if len(stored) == len(deltas) else []


def is_tall(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[0] >= TALL * shape[1] and shape[0] * shape[1] >= LARGE


def bytes_by_rows(models: int, columns: int) -> int:
    """About what is in memory while matrices of so many columns are decomposed by their rows."""
    return 8 * ((models + 8) * columns**2 + (models + 4) * BLOCK_NUMBERS)


def row_blocks(deltas: Sequence[Dense]) -> Iterator[list[Tensor]]:
    """The same rows of all changes, float32, block after block."""
    rows, columns = deltas[0].shape
    step = max(1, BLOCK_NUMBERS // columns)
    for start in range(0, rows, step):
        yield [dense(delta.rows(start, start + step), torch.float32) for delta in deltas]


def right_components(deltas: Sequence[Dense], rule: RankRule | None) -> list[tuple[Tensor, Tensor]] | None:
    """(S [k], V [m, k]) of every change, float32; None where a component that is kept is too small for D^T D.

    The Gram matrices are sums in float64 of the blocks' float32 products (what each adds is known to 1e-8 of it), or
    of float64 ones where the components that are kept differ too much for these.
    """
    for dtype, known in KNOWN.items():
        found = [_leading(gram, deltas[0].shape, rule, known) for gram in _grams(deltas, dtype)]
        if all(part is not None for part in found):
            return [part for part in found if part is not None]
    return None


def _grams(deltas: Sequence[Dense], dtype: torch.dtype) -> Tensor:
    """[T, m, m] float64: D^T D of every change."""
    columns = deltas[0].shape[1]
    found = torch.zeros(len(deltas), columns, columns, dtype=torch.float64, device=deltas[0].device)
    for blocks in row_blocks(deltas):
        for gram, block in zip(found, blocks, strict=True):
            exact = block.to(dtype)
            gram += exact.T @ exact
    return found


def _leading(gram: Tensor, shape: Sequence[int], rule: RankRule | None, known: float) -> tuple[Tensor, Tensor] | None:
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp_min(0).sqrt()
    count = count_kept(values, shape, rule, torch.float32)
    if count and squares[-count] < known * squares[-1]:
        return None
    return values[:count].to(torch.float32), vectors.flip(1)[:, :count].to(torch.float32)


def gram_of_images(deltas: Sequence[Dense], maps: Sequence[Tensor]) -> Tensor:
    """X^T X [r, r], float64, of X = [D_1 P_1, ..., D_T P_T] [n, r] in float32, for ``maps`` P_i [m, k_i]."""
    total = sum(part.shape[1] for part in maps)
    found = torch.zeros(total, total, dtype=torch.float64, device=deltas[0].device)
    for blocks in row_blocks(deltas):
        image = torch.cat([block @ part for block, part in zip(blocks, maps, strict=True)], dim=1).to(torch.float64)
        found += image.T @ image
    return found
