"""The magnitude above which an entry is among the largest of its vector: of one weight, or of the whole model.

The k-th largest of d numbers in two passes and constant memory (radix selection): float32 magnitudes are ordered as
their bit patterns are, so the first pass counts the upper 16 bits, which tells those of the k-th largest, and the
second counts the lower 16 bits among the entries with these upper ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.blocks import blocks
from ..algebra.delta import Delta

HALF = 16
BINS = 1 << HALF


def kept_entries(size: int, density: float) -> int:
    """How many of ``size`` entries are kept: density * size rounded down as in mergekit, one at least."""
    return max(1, int(density * size))


@dataclass(frozen=True)
class Cut:
    """Of one vector: entries above ``limit`` in magnitude (float32) are kept, and ``equal`` of those equal to it."""

    limit: float
    equal: int


def cuts(passes: Callable[[], Iterable[Tensor]], density: float | Sequence[float]) -> list[Cut]:
    """By vector, where its largest entries end: ``density`` is the share of them, one for all or one each.

    ``passes()`` goes through all entries once, in pieces [K, k]; it is called twice. O(K d) time, 512 kB per vector.
    Exact: the same as sorting all d float32 magnitudes. NaN counts as larger than any number.
    """
    upper = _count(passes(), None)
    size = int(upper[0].sum()) if len(upper) else 0
    if size == 0:
        return [Cut(0.0, 0)] * len(upper)
    shares = [density] * len(upper) if isinstance(density, float | int) else list(density)
    counts = [kept_entries(size, share) if share > 0 else 0 for share in shares]
    high, left = _bin_of(upper, torch.tensor(counts))
    low, equal = _bin_of(_count(passes(), high), left)
    limits = ((high << HALF) | low).to(torch.int32).view(torch.float32).tolist()
    return [
        Cut(limit, ties) if count else Cut(math.inf, 0)
        for limit, ties, count in zip(limits, equal.tolist(), counts, strict=True)
    ]


def thresholds(passes: Callable[[], Iterable[Sequence[Delta]]], density: float) -> list[float]:
    """By vector, the magnitude (rounded to float32) of the smallest entry to keep; equal ones are all kept.

    ``passes()`` goes through all weights once, giving the K changes of each; it is called twice.
    """
    return [cut.limit for cut in cuts(lambda: (part for deltas in passes() for part in blocks(deltas)), density)]


def tensor_thresholds(deltas: Sequence[Delta], density: float) -> list[float]:
    """The same within one weight."""
    return thresholds(lambda: [deltas], density)


def trimmed(values: Tensor, limits: Sequence[float]) -> Tensor:
    """[K, k] ``values`` with the entries below each vector's threshold set to zero; those equal to it are all kept."""
    floor = torch.tensor(list(limits), dtype=torch.float32, device=values.device)[:, None]
    return torch.where(values.to(torch.float32).abs() >= floor, values, torch.zeros_like(values))


def largest(parts: Iterable[Tensor], found: Sequence[Cut]) -> Iterator[Tensor]:
    """The pieces [K, k] with exactly what the cuts keep, of equals those that come first; changed in place."""
    left = [cut.equal for cut in found]
    for part in parts:
        for row, cut in enumerate(found):
            magnitudes = part[row].float().abs()
            keep = magnitudes >= cut.limit if left[row] > 0 else magnitudes > cut.limit
            if left[row] > 0:
                equal = magnitudes == cut.limit
                count = int(equal.sum())
                if count > left[row]:  # the last of them that are kept are in this piece
                    keep[equal.nonzero()[left[row] :, 0]] = False
                left[row] -= count
            part[row] *= keep
        yield part


def _count(parts: Iterable[Tensor], high: Tensor | None) -> Tensor:
    """[K, BINS] how many entries have each upper half, or each lower half where the upper one is ``high`` [K]."""
    counts = torch.zeros(0, BINS, dtype=torch.int64)
    for part in parts:
        if not len(counts):
            counts = torch.zeros(len(part), BINS, dtype=torch.int64, device=part.device)
        bits = part.to(torch.float32).abs().view(torch.int32)
        for row, pattern in enumerate(bits):
            upper = pattern >> HALF
            # One bin more for what is not of interest: selecting entries takes longer than counting them.
            found = upper if high is None else torch.where(upper == high[row], pattern & (BINS - 1), BINS)
            counts[row] += torch.bincount(found, minlength=BINS + 1)[:BINS]
    return counts.cpu()


def _bin_of(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """[K] the bin that holds the entry of this rank from the top (1 for the largest), and its rank within the bin."""
    above = counts.flip(1).cumsum(1)
    place = (above < rank[:, None]).sum(1)
    bins = counts.shape[1] - 1 - place
    return bins, rank - (above.gather(1, place[:, None]) - counts.gather(1, bins[:, None]))[:, 0]
