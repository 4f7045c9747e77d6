"""How much T adapters have in common, from short descriptions of each: one pass, no product of two adapters.

What two adapters can share are the input and the output directions that they use, each as much as it counts: of a
change D the matrices D^T D and D D^T, of norm 1. A description of K holds g_i^T K g_j for PROBES random normal vectors
and i < j: numbers whose products with those of K' have the mean <K, K'>. Two adapters so cost a product of two short
lists, where the inner product of all that they are costs O(r^2 (n + m)) for every pair and weight, T^2 / 2 times.

The weights and the two sides are independent estimates of the same similarity, and how much they scatter tells how far
off their mean is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...storage.parallel import each
from .factors import Factors, Opened

PROBES = 16
# Weights that are described; those between are much like them.
DESCRIBED = 48


@dataclass(frozen=True)
class Sketches:
    """``square_norms`` [T] float64 of whole adapters; ``features`` [T, blocks, numbers] float32, a block per weight and
    side."""

    square_norms: Tensor
    features: Tensor

    def similarity(self) -> tuple[Tensor, float]:
        """[T, T] estimated cosines of what adapters use, and the typical standard error of one."""
        total = torch.zeros(len(self.features), len(self.features))
        squares = torch.zeros_like(total)
        count = self.features.shape[1]
        for block in self.features.unbind(1):
            part = block @ block.T
            total += part
            squares += part.square()
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0) / max(1, count - 1)
        size = mean.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        scale = size[:, None] * size[None, :]
        return mean / scale, float((variance.sqrt() / scale).median())


def sketch(opened: Opened) -> Sketches:
    """Read every adapter once: its squared norm, and its description. Raises CheckpointError for NaN and infinity."""
    step = max(1, len(opened.names) // DESCRIBED)
    probes = {name: _probes(opened.shape(name), place) for place, name in enumerate(opened.names[::step])}

    def describe(one: Factors) -> tuple[float, Tensor]:
        total, blocks = 0.0, []
        for name in opened.names:
            change = one.change(name)
            norm, inner, outer = _grams(change)
            if not norm < float("inf"):
                one.refuse(name)
            total += norm
            if name in probes:
                blocks += _features(change, inner, outer, *probes[name])
        return total, torch.stack(blocks)

    found = [row for _, row in each(opened.factors, describe, "Describing adapters", lambda one: one.nbytes)]
    norms = torch.tensor([norm for norm, _ in found], dtype=torch.float64)
    return Sketches(norms, torch.stack([features for _, features in found]))


def _probes(shape: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return torch.randn(rows, PROBES, generator=generator), torch.randn(columns, PROBES, generator=generator)


def _grams(change: LowRank | None) -> tuple[float, Tensor, Tensor]:
    """The squared norm, B^T B and A A^T of B A."""
    if change is None:
        return 0.0, torch.zeros(0, 0), torch.zeros(0, 0)
    inner, outer = change.left.T @ change.left, change.right @ change.right.T
    return float((inner.double() * outer.double()).sum()), inner, outer


def _features(change: LowRank | None, inner: Tensor, outer: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """Of D^T D and D D^T, each of norm 1: g_i^T K g_j for i < j, times what makes the mean of products one."""
    upper = torch.triu_indices(PROBES, PROBES, offset=1)
    if change is None:
        return [torch.zeros(upper.shape[1])] * 2
    norm = ((outer @ inner) @ (outer @ inner)).diagonal().sum().clamp_min(0).sqrt()  # of D^T D, and of D D^T
    found = []
    for probes, middle in ((change.right @ columns, inner), (change.left.T @ rows, outer)):
        numbers = (probes.T @ middle @ probes)[upper[0], upper[1]]
        found.append(numbers / norm.clamp_min(torch.finfo(torch.float32).tiny) / upper.shape[1] ** 0.5)
    return found


def linkage(similarity: Tensor) -> list[tuple[int, int]]:
    """Average linkage: the T - 1 joins of two groups, named by their first members, the most similar ones first.

    O(T^2) per join in the worst case, of plain comparisons of one number per pair.
    """
    count = len(similarity)
    values = similarity.clone().to(torch.float32)
    values.fill_diagonal_(-torch.inf)
    size = torch.ones(count)
    best = values.max(dim=1)
    top, nearest = best.values.clone(), best.indices.clone()
    joins = []
    for _ in range(count - 1):
        first = int(top.argmax())
        second = int(nearest[first])
        first, second = min(first, second), max(first, second)
        joins.append((first, second))
        joined = (size[first] * values[first] + size[second] * values[second]) / (size[first] + size[second])
        size[first] += size[second]
        joined[first] = -torch.inf
        joined[second] = -torch.inf
        values[first], values[:, first] = joined, joined
        values[second], values[:, second] = -torch.inf, -torch.inf
        top[second] = -torch.inf
        stale = ((nearest == first) | (nearest == second)) & (top > -torch.inf)
        stale[first] = True
        better = joined > top
        top[better], nearest[better] = joined[better], first
        for place in stale.nonzero().flatten().tolist():
            found = values[place].max(dim=0)
            top[place], nearest[place] = found.values, found.indices
    return joins


def cut(joins: Sequence[tuple[int, int]], count: int, number: int, most: int) -> list[list[int]]:
    """The groups that remain when joins stop at ``number`` of them; no join makes a group of more than ``most``."""
    groups = {index: [index] for index in range(count)}
    owner = list(range(count))
    for first, second in joins:
        if len(groups) <= number:
            break
        left, right = owner[first], owner[second]
        if left != right and len(groups[left]) + len(groups[right]) <= most:
            for member in groups[right]:
                owner[member] = left
            groups[left] += groups.pop(right)
    return sorted(sorted(group) for group in groups.values())
