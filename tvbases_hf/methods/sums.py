"""Weighted sums of changes: task arithmetic (Ilharco et al., 2023) and the mean of models (model soups)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algebra.delta import Delta, Dense
from ..algebra.sums import total
from ..errors import ParameterError
from .registry import method

# mergekit's: weights that sum to less than this are not divided by their sum.
NO_SUM = 1e-8
# Weights that sum to 1 up to their own rounding leave the base as it is.
UNIT_SUM = 1e-9


@method(
    "task_arithmetic",
    title="Task Arithmetic",
    source="https://arxiv.org/abs/2212.04089",
    sum_only=True,
    equivariant=True,
)
def task_arithmetic(
    deltas: Sequence[Delta], weights: Sequence[float], *, normalize: bool = False, alpha: float = 1.0
) -> Delta:
    """The sum of the vectors.

    alpha * sum_i w_i delta_i, the weights divided by their sum when ``normalize`` (unless they cancel). Exact up to one
    rounding, in the smallest form that holds it: low-rank changes stay low-rank.
    """
    return total(deltas, [alpha * weight for weight in normalized(weights, normalize)])


@method("mean", title="Mean", source="https://arxiv.org/abs/2203.05482", sum_only=True, equivariant=True)
def mean(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """The mean of the vectors.

    sum_i w_i delta_i / sum_i w_i (model soups); low-rank changes stay low-rank.
    """
    return task_arithmetic(deltas, weights, normalize=True)


def normalized(weights: Sequence[float], normalize: bool = True) -> list[float]:
    """The weights divided by their sum, unless they cancel or ``normalize`` is false."""
    total = sum(weights)
    divisor = total if normalize and abs(total) >= NO_SUM else 1.0
    return [weight / divisor for weight in weights]


def base_share(weights: Sequence[float], normalize: bool) -> float:
    """How much of the base a weighted mean of models adds to the base: sum_i w_i - 1, zero for a mean.

    Raises ParameterError for a mean whose weights sum to zero.
    """
    total = sum(weights)
    if not normalize:
        return 0.0 if abs(total - 1) < UNIT_SUM else total - 1
    if abs(total) < NO_SUM:
        raise ParameterError(
            f"the weights of linear sum to {total:g}, and it divides by their sum; set normalize: false, or use "
            "task_arithmetic, where weights may cancel"
        )
    return 0.0


def linear(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    base_weight: float = 0.0,
    normalize: bool = True,
    base: Tensor | None = None,
) -> Delta:
    """sum_i w_i theta_i - theta_0 from the changes of the models theta_i, ``base_weight`` being that of theta_0.

    The sum of low-rank changes is low-rank. Weights that leave a share of the base (see base_share) scale it, which is
    dense; only then ``base``, which is theta_0, is needed.
    """
    shares, rest = linear_shares(weights, base_weight, normalize)
    if rest == 0:
        return task_arithmetic(deltas, shares)
    assert base is not None
    return total([*deltas, Dense(base.to(deltas[0].device))], [*shares, rest])


def linear_shares(weights: Sequence[float], base_weight: float, normalize: bool) -> tuple[list[float], float]:
    """How much of every change, and how much of the base, ``linear`` adds to the base."""
    everyone = [*weights, base_weight]
    rest = base_share(everyone, normalize)
    return [weight / sum(everyone) for weight in weights] if normalize else list(weights), rest
