"""A merging method in place of the sum: what it makes of the styles' changes of a weight, as factors of a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense, LowRank, dense
from ..errors import ParameterError
from ..methods.registry import Method, find_method
from ..methods.threshold import thresholds


@dataclass(frozen=True)
class StyleMethod:
    """A method of METHODS with its options, and for thresholds of the whole model those of each style.

    Methods of singular directions and sums keep the factors' space: their rank is at most the sum of the styles' ranks.
    Those that choose entry by entry (TIES, ...) have no factors but the matrix itself and the identity.
    """

    method: Method
    options: Mapping[str, Any]
    limits: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any] | None = None) -> StyleMethod:
        """Raises ParameterError for an unknown method or option, or a bad value."""
        method = find_method(name)
        return cls(method, method.checked(options or {}))

    @property
    def by_entry(self) -> bool:
        return not (self.method.of_matrices or self.method.sum_only)

    @property
    def is_linear(self) -> bool:
        """Whether the mix is linear in the scales, while the same styles are left out."""
        return self.method.is_linear(self.options)

    def of_styles(self, names: Sequence[str], passes: Callable[[], Iterable[Mapping[str, LowRank]]]) -> StyleMethod:
        """The same with the thresholds that ``passes``, twice all weights' changes by style, need."""
        density = self.method.of_whole_model(self.options)
        if density is None:
            return self
        found = thresholds(lambda: (_all(names, changes) for changes in passes()), density)
        return replace(self, limits=dict(zip(names, found, strict=True)))

    def rank(self, shape: Sequence[int], ranks: Sequence[int]) -> int:
        """Of the factors that the mix of changes of these ranks has at most."""
        return min(shape) if self.by_entry and ranks else sum(ranks)

    def mixed(self, name: str, changes: Mapping[str, LowRank], scales: Mapping[str, float]) -> LowRank:
        """The merged change of one matrix; a style of scale 0 is not there."""
        deltas: dict[str, Delta] = {style: change for style, change in changes.items() if scales[style] != 0}
        shape = next(iter(changes.values())).shape
        if not deltas:
            return LowRank.zeros(shape)
        merged = self._change(name, shape, deltas, scales)
        most = self.rank(shape, [change.rank for style, change in changes.items() if style in deltas])
        low = merged.factors
        low = _trivial_factors(dense(merged)) if low is None or low.rank > most else low
        return LowRank(low.left.to(torch.float32), low.right.to(torch.float32))

    def terms(
        self, name: str, changes: Mapping[str, LowRank], scales: Mapping[str, float]
    ) -> dict[str, LowRank] | None:
        """What each style puts into the merged change, to be added up times its scale; of those of scale 0 nothing.

        It holds for all scales that leave the same styles out. None where the method is not linear, or where it kept
        fewer directions than the styles have, so that whose they are cannot be told.
        """
        live = {style: change for style, change in changes.items() if scales[style] != 0}
        if not live or not self.is_linear:
            return None
        merged = self.mixed(name, changes, scales)
        if merged.rank != sum(change.rank for change in live.values()):
            return None
        found, start = {}, 0
        for style, change in live.items():
            own = slice(start, start := start + change.rank)
            found[style] = LowRank(merged.left[:, own] / scales[style], merged.right[own])
        return found

    def in_core(self, name: str, matrices: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
        """[p, q] float32: what an equivariant method makes of changes in the coordinates of their joint spaces.

        In float32, as the styles are: what is noise in their dtype is no direction here, as it is none in a file.
        """
        live: dict[str, Delta] = {
            style: Dense(matrix.to(torch.float32)) for style, matrix in matrices.items() if scales[style] != 0
        }
        shape = next(iter(matrices.values())).shape
        return dense(self._change(name, shape, live, scales), torch.float32) if live else torch.zeros(shape)

    def mixed_bias(self, name: str, biases: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
        """The merged change of a bias [n]."""
        deltas: dict[str, Delta] = {style: Dense(own) for style, own in biases.items() if scales[style] != 0}
        shape = next(iter(biases.values())).shape
        return dense(self._change(name, shape, deltas, scales), torch.float32) if deltas else torch.zeros(shape)

    def _change(
        self, name: str, shape: Sequence[int], deltas: Mapping[str, Delta], scales: Mapping[str, float]
    ) -> Delta:
        limits = {"limits": [self.limits[style] for style in deltas]} if self.limits else {}
        weights = [scales[style] for style in deltas]
        try:
            return self.method.change(name, shape, list(deltas.values()), weights, {**self.options, **limits})
        except torch.linalg.LinAlgError as error:
            words = ", ".join(f"{style} {weight:g}" for style, weight in zip(deltas, weights, strict=True))
            raise ParameterError(
                f"{name}: no decomposition by {self.method.name} at scales {words}; take smaller"
            ) from error


def _all(names: Sequence[str], changes: Mapping[str, LowRank]) -> list[Delta]:
    shape = next(iter(changes.values())).shape
    return [changes.get(name) or LowRank.zeros(shape) for name in names]


def _trivial_factors(matrix: Tensor) -> LowRank:
    """The matrix [n, m] itself, float64, and the identity of its shorter side."""
    rows, columns = matrix.shape
    one = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return LowRank(one, matrix) if rows < columns else LowRank(matrix, one)
