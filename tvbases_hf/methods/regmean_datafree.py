"""RegMean without data: the vectors themselves tell what a layer's inputs or outputs are like (WUDI; ACE-Merging)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.core import Core
from ..algebra.delta import Delta
from ..algebra.sums import total
from .registry import method

LOG = logging.getLogger(__name__)
# Conjugate gradients stop at this share of the right side's length, which is below float32's rounding, or here.
TOLERANCE = 1e-8
MOST_STEPS = 200
_warned: set[bool] = set()
Side = Annotated[
    Literal["row", "column", "both"],
    Field(description="whose second moments weigh the vectors: the rows' (a layer's inputs), the columns', or both"),
]
# A smaller ridge would be lost in the rounding of float64 for wide layers.
Ridge = Annotated[float, Field(ge=1e-6, description="weight of the mean of the vectors, a share of the mean diagonal")]


@method("regmean_datafree", title="Data-free RegMean", source="https://arxiv.org/abs/2603.02945", of_matrices=True)
def regmean_datafree(
    deltas: Sequence[Delta], weights: Sequence[float], *, side: Side = "row", ridge: Ridge = 0.01
) -> Delta:
    """What agrees best with every vector in the directions that it uses.

    With C_t = D_t^T D_t / |D_t|^2 of D_t = w_t delta_t in the place of the second moments of a layer's inputs, it is
    RegMean's closed form (sum_t D_t C_t + e M)(sum_t C_t + e I)^-1 with M the mean of the vectors and e ``ridge`` times
    the mean diagonal: vectors in different directions are added, copies of one are that vector. ``column`` is the same
    of the transposes; ``both`` solves sum_t A_t X C_t + e X = sum_t A_t D_t C_t + e M by conjugate gradients,
    A_t = D_t D_t^T / |D_t|^2. Other shapes than matrices take their mean. Low-rank changes stay so.
    """
    if len(deltas[0].shape) != 2:
        return total(deltas, [weight / len(deltas) for weight in weights])
    core = Core.of(deltas, weights)
    mean = sum(core.matrices[1:], core.matrices[0]) / len(deltas)
    tasks = [matrix for matrix in core.matrices if matrix.any()]
    if not tasks:
        return core.change(mean)
    rows, columns = deltas[0].shape
    if side == "row":
        return core.change(_of_rows(tasks, mean, ridge / columns))
    if side == "column":
        return core.change(_of_rows([task.T for task in tasks], mean.T, ridge / rows).T)
    return core.change(_of_both(tasks, mean, ridge / (rows * columns)))


def _of_rows(tasks: Sequence[Tensor], mean: Tensor, share: float) -> Tensor:
    """[p, q]; ``share`` is the ridge by direction: the traces of all C_t are 1."""
    moments = [task.T @ task / task.square().sum() for task in tasks]
    ridge = share * len(tasks)
    left = sum(moments[1:], moments[0]) + ridge * torch.eye(len(moments[0]), dtype=mean.dtype, device=mean.device)
    right = sum((task @ moment for task, moment in zip(tasks, moments, strict=True)), ridge * mean)
    return torch.linalg.solve(left, right, left=False)


def _of_both(tasks: Sequence[Tensor], mean: Tensor, share: float) -> Tensor:
    ridge, squares = share * len(tasks), [task.square().sum() for task in tasks]

    def moments(matrix: Tensor) -> Tensor:
        """sum_t A_t X C_t."""
        terms = (
            task @ (task.T @ matrix @ task.T) @ task / square**2 for task, square in zip(tasks, squares, strict=True)
        )
        return sum(terms, torch.zeros_like(matrix))

    cubes = (task @ (task.T @ task @ task.T) @ task / square**2 for task, square in zip(tasks, squares, strict=True))
    return _conjugate_gradients(lambda x: moments(x) + ridge * x, sum(cubes, ridge * mean), mean)


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, start: Tensor) -> Tensor:
    """X with apply(X) = right, for a positive definite linear map of matrices."""
    found, residual = start, right - apply(start)
    direction, square = residual, residual.square().sum()
    limit = TOLERANCE**2 * right.square().sum()
    for _ in range(MOST_STEPS):
        if square <= limit:
            return found
        image = apply(direction)
        step = square / (direction * image).sum()
        found, residual = found + step * direction, residual - step * image
        before, square = square, residual.square().sum()
        direction = residual + (square / before) * direction
    _warn_of_rest(float((square / right.square().sum()).sqrt()), tuple(start.shape))
    return found


def _warn_of_rest(rest: float, shape: tuple[int, ...]) -> None:
    """Say once that the steps were too few: the rest is in directions that the vectors hardly use."""
    if not _warned:
        LOG.warning(
            "regmean_datafree: after %d steps %.0e of the equation of both sides is left (first: a weight %s); a "
            "greater ridge needs fewer, and one side (side: row) none",
            MOST_STEPS, rest, list(shape),
        )  # fmt: skip
    _warned.add(True)
