"""Subspaces that lose about as much of every task, where least squares keeps some tasks whole and gives others up.

A task that is given up cannot be restored or forgotten at all, so for what is done to single tasks the worst
reconstruction counts, not the sum of all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..algebra.linalg import GRAM_CUTOFF, symmetric

# The sum of squares has local minima, so the search begins at many places: at fewer of them for many tasks, where it
# takes longer and the minima are closer to one another.
STARTS, FEWEST_STARTS, TASKS_IN_ALL = 20, 3, 600


def even_mixtures(rest: Tensor, norms: Tensor, count: int, seed: int) -> Tensor | None:
    """[T, count] mixtures of the vectors with Gram matrix ``rest`` whose span makes sum_t e_t^2 least.

    e_t is what the span leaves of vector t, |.|^2, relative to ``norms`` [T]; a vector of norm 0 does not count. The
    least sum of *squares* of squared errors has no closed form: it is searched for by L-BFGS from several places.
    None where the vectors have no more than ``count`` dimensions, so that nothing need be left of any.
    """
    values, vectors = torch.linalg.eigh(symmetric(rest))
    keep = values > GRAM_CUTOFF * norms.sum()
    if int(keep.sum()) <= count:
        return None
    roots, vectors = values[keep].sqrt(), vectors[:, keep]
    relative = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(norms))
    coordinates = (
        roots[:, None] * vectors.T * relative.sqrt()
    )  # [rank, T], the lengths those of ``rest`` over ``norms``
    left = coordinates.square().sum(dim=0)

    def loss(span: Tensor) -> Tensor:
        orthonormal = torch.linalg.qr(span).Q
        return (left - (orthonormal.T @ coordinates).square().sum(dim=0)).square().sum()

    found = [_descend(loss, span) for span in _starts(len(roots), count, seed)]
    chosen = min(found, key=lambda span: float(loss(span)))
    return vectors @ (torch.linalg.qr(chosen).Q / roots[:, None])


def _starts(rank: int, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    number = min(STARTS, max(FEWEST_STARTS, TASKS_IN_ALL // rank))
    return [torch.randn(rank, count, generator=generator, dtype=torch.float64) for _ in range(number)]


def _descend(loss: Callable[[Tensor], Tensor], span: Tensor) -> Tensor:
    span = torch.linalg.qr(span).Q.contiguous().requires_grad_()
    search = torch.optim.LBFGS(
        [span], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-12
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(span)
        value.backward()
        return value

    search.step(closure)
    return span.detach()
