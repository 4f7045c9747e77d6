"""A plan carried out: the adapters' changes decomposed, rounded to what is stored, and measured as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...algebra.products import inner
from ...storage.run import track
from ..sources import refit
from .choice import Plan
from .codec import Spec, Stored, restored, store
from .cores import Shared, block_sums
from .pool import Pool


@dataclass(frozen=True)
class Encoded:
    """The stored numbers, the decoder [rows, T] fitted to them, squared errors [T] before and after rounding."""

    plan: Plan
    specs: dict[str, Spec]
    stored: dict[str, Stored]
    decoder: Tensor
    before: Tensor
    after: Tensor


def encode(pool: Pool, plan: Plan, alpha: float, *, keep: bool = True) -> Encoded:
    """One pass over the adapters: decompose, round, and measure on the rounded numbers; ``keep=False``: errors only."""
    specs, stored = {}, {}
    exact, rounded = _Fit(plan, len(pool)), _Fit(plan, len(pool))
    for name in track(pool.names, "Encoding", lambda n: pool.vectors.base.tensors[n].nbytes):
        vectors, changes = plan.vectors(pool, name), pool.changes(name)
        spec, factor = _spec(pool, plan, name, vectors), pool.row_factor(name, alpha, plan.row_weights)
        for fit, dtype in ((exact, torch.float64), (rounded, pool.dtype)):
            packed = store(vectors, spec.shared, factor, dtype)
            fit.add(restored(packed, spec, factor), changes)
        if keep:
            specs[name], stored[name] = spec, packed
    before = exact.result()[1]
    decoder, after = rounded.result()
    return Encoded(plan, specs, stored, decoder, before, after + pool.rounding)


def _spec(pool: Pool, plan: Plan, name: str, vectors: list[LowRank] | Shared) -> Spec:
    layout, shape = pool.template.layouts[name], pool.shape(name)
    if isinstance(vectors, Shared):
        side = plan.choices[name].side
        return Spec.of(layout, shape, vectors.sizes, shared=side, pivots=list(vectors.pivots))
    return Spec.of(layout, shape, [vector.rank for vector in vectors])


class _Fit:
    """Accumulates the squared errors of T changes; where the vectors are not the tasks, also the best decoder."""

    def __init__(self, plan: Plan, tasks: int) -> None:
        rows = plan.weights.num_bases
        self._refits = plan.refits
        self._inner = torch.zeros(rows + tasks, rows + tasks, dtype=torch.float64)
        self._lost = torch.zeros(tasks, dtype=torch.float64)
        self._rows = rows

    def add(self, vectors: Sequence[LowRank], changes: Sequence[LowRank]) -> None:
        if self._refits:
            both = [*vectors, *changes]
            left = torch.cat([delta.left.to(torch.float64) for delta in both], dim=1)
            right = torch.cat([delta.right.to(torch.float64) for delta in both], dim=0)
            self._inner += block_sums(left, right.T, [delta.rank for delta in both])
            return
        for task, (vector, change) in enumerate(zip(vectors, changes, strict=True)):
            left = torch.cat([change.left.to(torch.float64), -vector.left.to(torch.float64)], dim=1)
            right = torch.cat([change.right.to(torch.float64), vector.right.to(torch.float64)], dim=0)
            difference = LowRank(left, right)
            self._lost[task] += inner(difference, difference)

    def result(self) -> tuple[Tensor, Tensor]:
        """Decoder [rows, T] and what it misses of every task [T]."""
        if not self._refits:
            return torch.eye(self._rows, dtype=torch.float64), self._lost.clamp_min(0)
        rows = self._rows
        decoder, saved = refit(self._inner[:rows, :rows], self._inner[:rows, rows:], has_mean=False)
        return decoder, (self._inner.diagonal()[rows:] - saved).clamp_min(0)
