"""Changes made to fit an adapter, of a given rank and in a given precision, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense, Dora, LowRank, blocks, dense, square_norm
from ..algebra.rank import RankRule
from ..algebra.svd import svd
from ..models.grouping import group_of, in_order
from ..models.lora_files import Template, nonzero
from ..storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Limits:
    """``rank`` None: as many components as the inputs have together, and all where one of them is dense.

    ``dtype``: of the stored factors.
    """

    rank: RankRule | None = None
    dtype: torch.dtype = torch.float32

    def fit(self, name: str, change: Delta, inputs: Sequence[Delta], base: Checkpoint, template: Template) -> Delta:
        """The change as an adapter will store it: factors where the template has factors, else a saved tensor."""
        if name in template.layouts and not (isinstance(change, Dense) and name in template.saved):
            return _rounded(self._truncated(change, inputs), self.dtype)
        if name in template.bias_modules:
            return change
        tensor = base.read(name)
        return Dense((tensor.to(torch.float64) + dense(change).reshape(tensor.shape)).to(tensor.dtype), tensor)

    def _truncated(self, change: Delta, inputs: Sequence[Delta]) -> LowRank | Dora:
        match change:
            case LowRank():
                if change.rank <= self._kept_without_loss(change.shape):
                    return change
                return svd(change, self.rank).low_rank()
            case Dora():
                low = self._truncated(change.low, inputs)
                assert isinstance(low, LowRank)
                return Dora(change.scale, change.base, low)
            case _:
                flat = dense(change, torch.float32).reshape(change.shape[0], -1)
                if self.rank is None and any(isinstance(delta, Dense) for delta in inputs):
                    return _whole(flat)
                return svd(flat, self.rank or RankRule("absolute", max(1, _rank_sum(inputs)))).low_rank()

    def _kept_without_loss(self, shape: tuple[int, ...]) -> int:
        """Factors of this rank are stored as they are."""
        if self.rank is None:
            return min(shape)
        return 0 if self.rank.needs_spectrum else self.rank.of_shape(*shape)


@dataclass
class Errors:
    """Squared errors and squared norms of changes, by layer group."""

    lost: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, change: Delta, fitted: Delta) -> None:
        group = group_of(name)
        lost, total = _measured(change, fitted)
        self.lost[group] = self.lost.get(group, 0.0) + lost
        self.total[group] = self.total.get(group, 0.0) + total

    def relative(self) -> dict[str, float]:
        """|fitted - change| / |change| per group, and over all of them; 0 where nothing changes."""
        found = {group: _ratio(self.lost[group], self.total[group]) for group in in_order(self.lost)}
        return {**found, "all": _ratio(sum(self.lost.values()), sum(self.total.values()))}


def _ratio(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _whole(matrix: Tensor) -> LowRank:
    """A matrix as factors of full rank, exact in any dtype: itself and an identity, whatever their order."""
    rows, columns = matrix.shape
    return LowRank(matrix, torch.eye(columns)) if columns <= rows else LowRank(torch.eye(rows), matrix)


def _rank_sum(inputs: Sequence[Delta]) -> int:
    low = [delta.low if isinstance(delta, Dora) else delta for delta in inputs]
    return sum(delta.rank for delta in low if isinstance(delta, LowRank))


def _rounded(change: LowRank | Dora, dtype: torch.dtype) -> LowRank | Dora:
    """With the numbers that factors of ``dtype`` can hold; DoRA stores the left one divided by the rows' scale."""
    if dtype == torch.float32:
        return change
    if isinstance(change, Dora):
        factor = nonzero(1 + change.scale)[:, None]
        low = _rounded(LowRank(change.low.left / factor, change.low.right), dtype)
        assert isinstance(low, LowRank)
        return Dora(change.scale, change.base, LowRank(low.left * factor, low.right))
    return LowRank(change.left.to(dtype).to(torch.float32), change.right.to(dtype).to(torch.float32))


def _measured(change: Delta, fitted: Delta) -> tuple[float, float]:
    """|change - fitted|_F^2 and |change|_F^2; of low-rank ones in factor space, 1e-16 of the latter being noise."""
    match change, fitted:
        case _ if change is fitted:
            return 0.0, square_norm(change)
        case LowRank(), LowRank():
            both = [change, fitted]
            left = torch.cat([part.left.to(torch.float64) for part in both], dim=1)
            right = torch.cat([part.right.to(torch.float64) for part in both], dim=0)
            products, rank = (left.T @ left) * (right @ right.T), change.rank
            signs = torch.ones(len(products), dtype=torch.float64)
            signs[rank:] = -1
            return max(0.0, float(signs @ products @ signs)), max(0.0, float(products[:rank, :rank].sum()))
        case Dora(), Dora() if change.scale is fitted.scale:
            return _measured(change.low, fitted.low)[0], square_norm(change)
        case _:
            return float(sum((a - b).square().sum() for a, b in blocks([change, fitted]))), square_norm(change)
