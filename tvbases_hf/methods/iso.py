"""Isotropic merging: the vectors with all of their directions equally strong (Marczak et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from ..algebra.components import SVD
from ..algebra.core import Core
from ..algebra.delta import Delta, Dense, LowRank, dense
from ..algebra.linalg import negligible
from ..algebra.polar import exact_polar, polar
from ..algebra.sums import total
from ..algebra.svd import exact_svd, svd
from .registry import method
from .spectrum import flattened

PAPER = "https://arxiv.org/abs/2502.04959"
Flatness = Annotated[
    float, Field(ge=0, le=1, description="power of the singular values: 0 makes all equal, 1 leaves them as they are")
]
Common = Annotated[float, Field(ge=0, le=1, description="share of the directions that come from the sum")]


@method("iso_c", title="Iso-C", source=PAPER, of_matrices=True, sum_only=True, equivariant=True)
def iso_c(deltas: Sequence[Delta], weights: Sequence[float], *, spectrum: Flatness = 0.0) -> Delta:
    """The sum of the vectors, all of its singular values replaced by their mean.

    mean(S) U V^T of sum_i w_i delta_i = U S V^T; other shapes than matrices take their mean,
    (1/K) sum_i w_i delta_i, as in TSV-Merge. A sum of low-rank changes is never multiplied out. With a ``spectrum``
    between 0 and 1 the values are S^p, scaled to the same nuclear norm: half-flat, and at 1 task arithmetic.

    Of a sum of rank k below min(n, m) the other directions are not known, so the mean is over the k singular values
    that are more than rounding noise, however the changes are stored. The nuclear norm is that of the sum. U V^T of a
    dense sum is its polar factor, for which no singular vectors are needed.
    """
    summed = total(deltas, weights)
    if len(summed.shape) != 2:
        return total(deltas, [weight / len(deltas) for weight in weights])
    if isinstance(summed, Dense) and spectrum == 0:
        factor, values = polar(dense(summed, torch.float32))
        return Dense(factor * values.mean().to(factor.dtype)) if len(values) else summed
    parts = svd(summed)
    return LowRank(parts.U * flattened(parts.S, spectrum), parts.V.T) if parts.rank else parts.low_rank()


@method("iso_cts", title="Iso-CTS", source=PAPER, of_matrices=True, equivariant=True)
def iso_cts(deltas: Sequence[Delta], weights: Sequence[float], *, common: Common = 0.8) -> Delta:
    """The leading directions of the sum and the vectors' own ones, all equally strong.

    Of the r directions of s = sum_i w_i delta_i the leading share ``common`` is kept; the rest is left to the leading
    directions of every w_i delta_i - U_k U_k^T w_i delta_i, equally many of each of the T vectors (k = r - T round((r -
    common r) / T)). Both sides are replaced by their polar factors, and all values by the mean of those that were kept.
    Other shapes take their mean. Everything happens in the coordinates of the vectors' joint spaces. What is rounding
    noise in the dtype of the changes is no direction, although the coordinates are float64: it would become as strong
    as the others.
    """
    if len(deltas[0].shape) != 2:
        return total(deltas, [weight / len(deltas) for weight in weights])
    core = Core.of(deltas, weights)
    tasks = [matrix for matrix in core.matrices if matrix.any()]
    if not tasks:
        return core.change(core.matrices[0])
    noise = negligible(deltas[0].shape, core.dtype)
    summed = _above(exact_svd(sum(tasks[1:], tasks[0])), noise)
    own = round((summed.rank - int(common * summed.rank)) / len(tasks))
    kept = summed.keep(max(0, summed.rank - own * len(tasks)))
    least = min(tasks[0].shape) ** -0.5  # of a matrix's norm, its largest singular value
    rest = [_above(exact_svd(t - kept.U @ (kept.U.T @ t)), noise, least * float(t.norm())).keep(own) for t in tasks]
    parts = [kept, *rest]
    sides = [torch.cat(side, dim=1) for side in ([p.U for p in parts], [p.V for p in parts])]
    left, right = (exact_polar(side, core.dtype).factor for side in sides)
    return core.product(left * torch.cat([part.S for part in parts]).mean(), right.T)


def _above(parts: SVD, noise: float, largest: float = 0.0) -> SVD:
    """The components above that share of the largest one, which is at least ``largest``."""
    if not parts.rank:
        return parts
    least = noise * max(largest, float(parts.S[0]))
    return parts.keep(int((parts.S - least > 0).sum()))
