"""The last step of any merge of matrices: another spectrum for the merged change (SVC; half-flat spectra)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.components import SVD
from ..algebra.delta import Delta, LowRank
from ..algebra.linalg import negligible
from ..algebra.products import premultiplied
from ..algebra.svd import svd

Calibrate = Annotated[
    Literal["none", "svc"],
    Field(description="of the merge's singular values: svc divides each by how often the vectors count it"),
]
Spectrum = Annotated[
    float, Field(ge=0, le=1, description="power of the singular values, at the same sum: 1 as they are, 0 all equal")
]


@dataclass(frozen=True)
class LastStep:
    """What is done to the singular values of a merged matrix: calibration, then the power. Other shapes stay.

    Calibration (SVC, arXiv 2602.05536) replaces s_r by s_r T / sum_t max(1, <a_r, a_rt> / |a_rt|^2) with a_r = u_r^T
    times the merged matrix and a_rt = u_r^T w_t delta_t of the T vectors that are not zero: a direction that several
    of them share was counted several times.
    """

    calibrate: Calibrate = "none"
    spectrum: Spectrum = 1.0

    @property
    def changes(self) -> bool:
        return self != LastStep()

    def __call__(self, merged: Delta, deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
        parts = svd(merged)
        if not parts.rank:
            return merged
        values = parts.S
        if self.calibrate == "svc":
            values = values / _counted(parts, [(d, w) for d, w in zip(deltas, weights, strict=True) if w])
        return LowRank(parts.U * flattened(values, self.spectrum), parts.V.T)


def flattened(values: Tensor, power: float) -> Tensor:
    """S^p mean(S) / mean(S^p) of positive numbers S [k]: their sum is kept; 1 leaves them, 0 makes them equal."""
    raised = (values / values.max()) ** power
    return values if power == 1 else raised * (values.mean() / raised.mean())


def _counted(parts: SVD, terms: Sequence[tuple[Delta, float]]) -> Tensor:
    """[k] the mean over the vectors of max(1, <a_r, a_rt> / |a_rt|^2); 1 of one that has rounding noise alone there."""
    merged = parts.S[:, None] * parts.V.T
    counts, seen = torch.zeros_like(parts.S), 0
    for delta, weight in terms:
        own = weight * premultiplied(parts.U.T, delta)
        squares = own.square().sum(dim=1)
        noise = negligible(delta.shape) ** 2 * squares.sum()
        if noise:
            counts += torch.where(squares > noise, (merged * own).sum(dim=1) / squares, 1.0).clamp_min(1)
            seen += 1
    return counts / max(1, seen)
