"""Iso-C: the sum of the vectors with all of its directions equally strong (Marczak et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence

from ..algebra.delta import Delta, LowRank
from ..algebra.sums import total
from ..algebra.svd import svd
from .registry import method


@method("iso_c", title="Iso-C", source="https://arxiv.org/abs/2502.04959", of_matrices=True, sum_only=True)
def iso_c(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """The sum of the vectors, all of its singular values replaced by their mean.

    mean(S) U V^T of sum_i w_i delta_i = U S V^T; other shapes than matrices take their mean,
    (1/K) sum_i w_i delta_i, as in TSV-Merge. A sum of low-rank changes is never multiplied out.

    Of a sum of rank k below min(n, m) the other directions are not known, so the mean is over the k singular values
    that are more than rounding noise, however the changes are stored. The nuclear norm is that of the sum.
    """
    summed = total(deltas, weights)
    if len(summed.shape) != 2:
        return total(deltas, [weight / len(deltas) for weight in weights])
    parts = svd(summed)
    return LowRank(parts.U * parts.S.mean(), parts.V.T) if parts.rank else parts.low_rank()
