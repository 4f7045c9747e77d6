"""Changes made to fit an adapter, of a given rank and in a given precision, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import defaults
from ..algebra.delta import Delta, Dense, LowRank, Stacked, dense, low_parts
from ..algebra.products import square_distance
from ..algebra.rank import RankRule
from ..algebra.svd import svd
from ..models.adapter import Adapter
from ..models.hosts import check_foreseen, fitted
from ..models.lora_files import nonzero
from ..models.lora_template import Template
from ..models.positions import in_order
from ..storage.checkpoint import Checkpoint

# Random columns by which a matrix of low rank is told.
SKETCH = 256


@dataclass(frozen=True)
class Limits:
    """``rank`` None: as many components as the inputs have together, and all where one of them is dense.

    ``dtype``: of the stored factors. ``equal_rank``: one rank in all modules, padded with zeros. ``host``: what will
    load the adapter; see models.hosts.
    """

    rank: RankRule | None = None
    dtype: torch.dtype = torch.float32
    equal_rank: bool = False
    host: defaults.Host | None = None

    def fit(self, name: str, change: Delta, inputs: Sequence[Delta], base: Checkpoint, template: Template) -> Delta:
        """The change as an adapter will store it: factors where the template has factors, else a saved tensor."""
        if name in template.parameters and change.low is None:
            return _rounded(self._stacked(change, inputs), self.dtype)
        if template.has_factors(name, change):
            return _rounded(self._truncated(change, inputs), self.dtype)
        if name in template.bias_modules or name in template.tokens:
            return change
        tensor = base.read(name)
        return Dense((tensor.to(torch.float64) + dense(change).reshape(tensor.shape)).to(tensor.dtype), tensor)

    def check(self, adapters: Sequence[Adapter], template: Template) -> None:
        """Raises ParameterError where the host could not load what is made of the adapters, as far as that is known."""
        check_foreseen(self.host, adapters, template, self.rank)

    def finished(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An adapter as it is written. Raises ParameterError for one that the host cannot load."""
        return fitted(tensors, config, self.equal_rank, self.host)

    def _stacked(self, change: Delta, inputs: Sequence[Delta]) -> Delta:
        """Matrix by matrix; a matrix that is stored whole as one that a LoRA could make."""
        if change.parts is not None:
            return change if self.rank is None else change.with_low(self._cut)
        if len(change.shape) != 3:
            return self._truncated(change, inputs)
        parts = dense(change, torch.float32)
        return Stacked.of([_without_loss(part) for part in parts]).with_low(self._cut)

    def _truncated(self, change: Delta, inputs: Sequence[Delta]) -> Delta:
        if change.low is not None:
            return change.with_low(self._cut)
        flat, low = dense(change, torch.float32).reshape(change.shape[0], -1), low_parts(inputs)
        if self.rank is None and len(low) < len(inputs):
            return _without_loss(flat)
        return svd(flat, self.rank or RankRule("absolute", max(1, sum(part.rank for part in low)))).low_rank()

    def _cut(self, low: LowRank) -> LowRank:
        return low if low.rank <= self._kept_without_loss(low.shape) else svd(low, self.rank).low_rank()

    def _kept_without_loss(self, shape: tuple[int, ...]) -> int:
        """Factors of this rank are stored as they are."""
        if self.rank is None:
            return min(shape)
        return 0 if self.rank.needs_spectrum else self.rank.of_shape(*shape)


@dataclass
class Errors:
    """Squared errors and squared norms of changes, by layer group: ``groups`` tells that of every weight."""

    groups: Mapping[str, str]
    lost: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, change: Delta, fitted: Delta) -> None:
        group = self.groups[name]
        lost, total = square_distance(change, fitted)
        self.lost[group] = self.lost.get(group, 0.0) + lost
        self.total[group] = self.total.get(group, 0.0) + total

    def relative(self) -> dict[str, float]:
        """|fitted - change| / |change| per group, and over all of them; 0 where nothing changes."""
        found = {group: _ratio(self.lost[group], self.total[group]) for group in in_order(self.lost)}
        return {**found, "all": _ratio(sum(self.lost.values()), sum(self.total.values()))}


def _ratio(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _without_loss(matrix: Tensor) -> LowRank:
    """A matrix as factors of its rank, up to the rounding of its numbers, where few tell; else of full rank.

    Its product with more random columns than its rank spans its own columns (Halko et al., 2011, algorithm 4.1).
    """
    exact, sketched = matrix.to(torch.float64), min(SKETCH, min(matrix.shape) // 2)
    random = torch.randn(matrix.shape[1], sketched, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    span = torch.linalg.qr(exact @ random.to(matrix.device)).Q
    inside = span.T @ exact
    noise = 4 * torch.finfo(torch.float32).eps * float(exact.norm())
    if float((exact - span @ inside).norm()) > noise:
        return _whole(matrix)
    left, values, right = torch.linalg.svd(inside, full_matrices=False)
    rank = int((values > noise / max(1, sketched)).sum())
    root = values[:rank].sqrt()
    return LowRank((span @ left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float())


def _whole(matrix: Tensor) -> LowRank:
    """A matrix as factors of full rank, exact in any dtype: itself and an identity, whatever their order."""
    rows, columns = matrix.shape
    return LowRank(matrix, torch.eye(columns)) if columns <= rows else LowRank(torch.eye(rows), matrix)


def _rounded(change: Delta, dtype: torch.dtype) -> Delta:
    """With the numbers that factors of ``dtype`` can hold; DoRA stores the left one divided by the rows' scale."""
    if dtype == torch.float32:
        return change
    factor = 1.0 if change.row_scale is None else nonzero(1 + change.row_scale)[:, None]

    def rounded(low: LowRank) -> LowRank:
        left, right = (part.to(dtype).to(torch.float32) for part in (low.left / factor, low.right))
        return LowRank(left * factor, right)

    return change.with_low(rounded)
