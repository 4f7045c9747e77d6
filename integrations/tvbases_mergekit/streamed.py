"""mergekit's task arithmetic, TIES and DARE on full checkpoints, with a piece of every model in memory.

The same numbers as mergekit's own, which holds whole tensors: the dtype of the work, how many entries are kept, and
which sign wins. Two things are left open there and fixed here: of entries equal in magnitude those are kept that come
first (mergekit's sort is not stable, so its choice depends on the machine), and DARE's draws follow a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import MergeMethod
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GeneralizedTaskArithmeticMerge
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from tvbases_hf.algebra.blocks import block_numbers
from tvbases_hf.algebra.delta import Dense, work_dtype
from tvbases_hf.methods.sparse import elected
from tvbases_hf.methods.sums import NO_SUM
from tvbases_hf.methods.threshold import cuts, largest

# mergekit's: a mask that leaves less than this is not made up for.
SMALLEST_NORM = 1e-7
STREAMED = (None, SparsificationMethod.magnitude, SparsificationMethod.random)


@dataclass(frozen=True)
class Pieces:
    """K changes of one weight, as sums of the models' changes: ``mixing`` [T, K], None for the models themselves."""

    deltas: Sequence[Dense]
    mixing: Tensor | None = None

    @property
    def size(self) -> int:
        return self.deltas[0].tuned.numel()

    @property
    def device(self) -> torch.device:
        return self.deltas[0].device

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of the work: what is stored, float32 at least."""
        return work_dtype(self.deltas)

    def blocks(self) -> Iterator[Tensor]:
        """[K, k] consecutive pieces of the flattened vectors."""
        step = max(1, block_numbers(self.device) // len(self.deltas))
        flats = [(d.tuned.reshape(-1), d.base) for d in self.deltas]
        mixing = None if self.mixing is None else self.mixing.T.to(self.device, self.dtype)
        for start in range(0, self.size, step):
            part = torch.empty(len(flats), min(step, self.size - start), dtype=self.dtype, device=self.device)
            known: dict[int, Tensor] = {}  # the base's piece, converted once: Pieces gives all models one base
            for row, (tuned, base) in zip(part, flats, strict=True):
                row.copy_(tuned[start : start + step])
                if base is not None:
                    if id(base) not in known:
                        known[id(base)] = base.reshape(-1)[start : start + step].to(self.dtype)
                    row.sub_(known[id(base)])
            yield part if mixing is None else mixing @ part


def can_stream(method: MergeMethod) -> bool:
    return isinstance(method, GeneralizedTaskArithmeticMerge) and method.sparsification_method in STREAMED


def streamed(method: MergeMethod, vectors: Pieces, settings: Mapping[str, Any], seed: int) -> Iterator[Tensor]:
    """What a method that can_stream adds to the base, in pieces of the work's dtype.

    Args:
        settings: every parameter of the method: one value, or one per vector.
        seed: of the weight, for what is drawn at random.
    """
    assert isinstance(method, GeneralizedTaskArithmeticMerge)
    weights = torch.tensor(settings["weight"], dtype=vectors.dtype, device=vectors.device)
    trimmed = _trimmed(method, vectors, settings, seed)
    for part in trimmed():
        part = part * weights[:, None]
        if method.consensus_method is None:
            total, divisor = part.sum(0), weights.sum()
        else:
            mask = _agreeing(part, method.consensus_method)
            total, divisor = (part * mask).sum(0), (weights[:, None] * mask).sum(0)
        if settings["normalize"]:
            total = total / torch.where(_is_zero(method, divisor), torch.ones_like(divisor), divisor)
        yield settings["lambda"] * total


def weighted(vectors: Pieces, shares: Tensor, alpha: float) -> Iterator[Tensor]:
    """alpha * sum_i shares_i vector_i in the work's dtype.

    A sum of sums is a sum: the vectors are not made. Models without a share are not read.
    """
    weights = shares if vectors.mixing is None else vectors.mixing @ shares
    kept = [index for index, weight in enumerate(weights.tolist()) if weight != 0]
    if not kept:
        yield torch.zeros(vectors.size, dtype=vectors.dtype, device=vectors.device)
        return
    chosen = Pieces([vectors.deltas[index] for index in kept])
    row = weights[kept].to(vectors.device, vectors.dtype)
    for part in chosen.blocks():
        yield alpha * (row @ part)


def _trimmed(
    method: GeneralizedTaskArithmeticMerge, vectors: Pieces, settings: Mapping[str, Any], seed: int
) -> Callable[[], Iterator[Tensor]]:
    """The vectors without the entries that the method drops, as often as they are asked for."""
    densities = [float(density) for density in settings.get("density", [1.0] * len(settings["weight"]))]
    match method.sparsification_method:
        case None:
            kept = vectors.blocks
        case SparsificationMethod.magnitude:
            found = cuts(vectors.blocks, densities)
            kept = lambda: largest(vectors.blocks(), found)  # noqa: E731
        case _:
            kept = functools.partial(_drawn, vectors, densities, seed)
    if not settings["rescale"] or method.sparsification_method is None:
        return kept
    factors = _restored_length(vectors, kept)
    return lambda: (part * factors[:, None] for part in kept())


def _drawn(vectors: Pieces, densities: Sequence[float], seed: int) -> Iterator[Tensor]:
    generators = [torch.Generator().manual_seed(seed * len(densities) + row) for row in range(len(densities))]
    for part in vectors.blocks():
        for row, (density, generator) in enumerate(zip(densities, generators, strict=True)):
            if density < 1:
                # Drawn on the CPU: a seed means the same entries whatever computes the rest.
                drawn = torch.empty(part.shape[1], dtype=part.dtype).bernoulli_(density, generator=generator)
                part[row] *= drawn.to(part.device)
        yield part


def _restored_length(vectors: Pieces, kept: Callable[[], Iterator[Tensor]]) -> Tensor:
    """[K] what brings the 1-norm of every vector back to what it was."""
    before = sum(part.abs().sum(1, dtype=torch.float64) for part in vectors.blocks())
    after = sum(part.abs().sum(1, dtype=torch.float64) for part in kept())
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    small = (before < SMALLEST_NORM) | (after < SMALLEST_NORM)
    return torch.where(small, torch.ones_like(before), before / after).to(vectors.dtype)


def _agreeing(part: Tensor, how: ConsensusMethod) -> Tensor:
    """[K, k] whether an entry has the sign that the sum (or the most) of the vectors have there, + if they cancel."""
    total = part.sum(0) if how == ConsensusMethod.sum else part.sign().sum(0)
    return part.sign() == elected(total, 1.0)


def _is_zero(method: GeneralizedTaskArithmeticMerge, divisor: Tensor) -> Tensor:
    return divisor == 0 if method.consensus_method else divisor.abs() < NO_SUM
