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
Ridge = Annotated[float, Field(ge=1e-6, description="weight of the vectors' mean, as a share of the mean diagonal")]


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
    ridge, units = share * len(tasks), [task / task.norm() for task in tasks]

    def moments(matrix: Tensor) -> Tensor:
        """sum_t A_t X C_t."""
        terms = (unit @ (unit.T @ matrix @ unit.T) @ unit for unit in units)
        return sum(terms, torch.zeros_like(matrix))

    cubes = (unit @ (unit.T @ task @ unit.T) @ unit for unit, task in zip(units, tasks, strict=True))
    inverse = _near_inverse([unit @ unit.T for unit in units], [unit.T @ unit for unit in units], ridge)
    return _conjugate_gradients(lambda x: moments(x) + ridge * x, sum(cubes, ridge * mean), mean, inverse)


def _near_inverse(rows: Sequence[Tensor], columns: Sequence[Tensor], ridge: float) -> Callable[[Tensor], Tensor]:
    """About the inverse of X -> sum_t A_t X C_t + ridge X, for ``rows`` A_t [p, p] and ``columns`` C_t [q, q].

    In bases F and G in which all A_t, and all C_t, are as diagonal as can be, the map is taken for its diagonal.
    """
    F, G = _shared_basis(rows, ridge**0.5), _shared_basis(columns, ridge**0.5)
    diagonal = ridge * torch.outer(F.square().sum(dim=0), G.square().sum(dim=0))
    for a, c in zip(rows, columns, strict=True):
        diagonal += torch.outer((F * (a @ F)).sum(dim=0), (G * (c @ G)).sum(dim=0))
    return lambda matrix: F @ ((F.T @ matrix @ G) / diagonal) @ G.T


def _shared_basis(moments: Sequence[Tensor], floor: float) -> Tensor:
    """[p, p] columns in which positive semidefinite matrices are about diagonal together.

    Made white by their sum (plus ``floor``) the moments of tasks in directions of their own are projections, which
    share eigenvectors: those of a sum with another weight for each.
    """
    values, vectors = torch.linalg.eigh(sum(moments[1:], moments[0]))
    white = vectors / (values.clamp_min(0) + floor).sqrt()
    apart = sum((weight * (white.T @ moment @ white) for weight, moment in enumerate(moments, 1)), white.new_zeros(()))
    return white @ torch.linalg.eigh(apart).eigenvectors


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, inverse: Callable[[Tensor], Tensor]
) -> Tensor:
    """X with apply(X) = right, for a positive definite linear map of matrices, whose inverse is about ``inverse``."""
    found, residual = start, right - apply(start)
    direction, limit = inverse(residual), TOLERANCE**2 * right.square().sum()
    product = (residual * direction).sum()
    for _ in range(MOST_STEPS):
        if residual.square().sum() <= limit:
            return found
        image = apply(direction)
        step = product / (direction * image).sum()
        found, residual = found + step * direction, residual - step * image
        scaled = inverse(residual)
        before, product = product, (residual * scaled).sum()
        direction = scaled + (product / before) * direction
    _warn_of_rest(float((residual.square().sum() / right.square().sum()).sqrt()), tuple(start.shape))
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
