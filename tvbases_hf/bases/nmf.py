"""Non-negative factorisations of the tasks: convex NMF (Ding, Li and Jordan, 2010) and non-negative PCA.

Both need the tasks' inner products alone, so that they work on the T x T Gram matrix.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .ae import ae_bases, fitted
from .registry import construction
from .weights import BasisWeights, check_gram, resolve_num_bases, squared_error

CONVEX_NMF = "https://doi.org/10.1109/TPAMI.2008.277"
NON_NEGATIVE_PCA = "https://arxiv.org/abs/1406.4775"
# Multiplicative steps leave a zero where it is: the start is this share of its own mean away from all zeros.
START_ABOVE_ZERO = 0.2
# Ten multiplicative steps that win less than this share of the whole are the last; a step of non-negative PCA.
SETTLED, PCA_SETTLED = 1e-8, 1e-13
# A residual below this share of the Gram matrix is rounding noise.
NOTHING_LEFT = 1e-12
PCA_STEPS = 1000


@construction("nmf", "nmf_bases", "Convex NMF task-vector bases", CONVEX_NMF)
def nmf_bases(
    gram: Tensor,
    num_bases: float = 0.5,
    *,
    steps: Annotated[int, Field(ge=1, description="most multiplicative steps")] = 500,
) -> BasisWeights:
    """Convex combinations of the tasks that restore all by non-negative shares (convex NMF).

    min |T - T W H|^2 over W [T, M] >= 0 and H [M, T] >= 0 by the multiplicative steps of Ding, Li and Jordan, which
    never raise it, from the balanced autoencoder bases. The columns of W are scaled to sum to 1, and H with them.
    """
    gram = check_gram(gram)
    count = resolve_num_bases(num_bases, len(gram))
    start = ae_bases(gram, count)
    if not gram.any():
        return fitted("nmf", gram, start.encoder)
    unit = gram / gram.trace()
    above, below = unit.clamp_min(0), (-unit).clamp_min(0)
    shares, parts = _lifted(start.encoder), _lifted(start.decoder.clamp_min(0).T)
    loss = torch.inf
    for step in range(steps):
        parts = parts * _ratio(
            above @ shares + parts @ (shares.T @ (below @ shares)),
            below @ shares + parts @ (shares.T @ (above @ shares)),
        )
        inner = parts.T @ parts
        shares = shares * _ratio(above @ parts + below @ shares @ inner, below @ parts + above @ shares @ inner)
        if step % 10 == 0:
            before, loss = loss, squared_error(unit, shares @ parts.T)
            if before - loss < SETTLED:
                break
    sums = shares.sum(dim=0)
    encoder, decoder = shares / sums, sums[:, None] * parts.T
    spectral = float(torch.linalg.eigvalsh(gram)[: len(gram) - count].sum().clamp_min(0))
    found = squared_error(gram, encoder @ decoder)
    return BasisWeights("nmf", encoder, decoder, found, spectral, spectral, total=float(gram.trace()))


@construction("pca_nonnegative", "pca_nonnegative", "Non-negative PCA task-vector bases", NON_NEGATIVE_PCA)
def pca_nonnegative(gram: Tensor, num_bases: float = 0.5) -> BasisWeights:
    """Convex combinations of the tasks, each as long as its weights allow (non-negative PCA).

    Basis m is T u with u >= 0 of length 1 that makes u^T R u greatest, R the inner products of what the bases before it
    leave of the tasks (deflation by projection); found by u <- (R u)_+ / |(R u)_+|, which never lowers it, from every
    single task. The decoder is the one of least squares. ``pca_positive`` is the AE paper's own baseline.
    """
    gram = check_gram(gram)
    count = resolve_num_bases(num_bases, len(gram))
    encoder = torch.zeros(len(gram), 0, dtype=torch.float64)
    for _ in range(count):
        left = gram - gram @ encoder @ fitted("pca_nonnegative", gram, encoder).decoder if encoder.numel() else gram
        noise = left.trace() <= NOTHING_LEFT * gram.trace()
        found = _unused(encoder) if noise else _longest((left + left.T) / 2)
        encoder = torch.cat([encoder, (found / found.sum())[:, None]], dim=1)
    return fitted("pca_nonnegative", gram, encoder)


def _lifted(factor: Tensor) -> Tensor:
    return factor + START_ABOVE_ZERO * factor.mean()


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The square root of above / below; 1 where both are 0."""
    tiny = torch.finfo(torch.float64).tiny
    return ((above + tiny) / (below + tiny)).sqrt()


def _longest(gram: Tensor) -> Tensor:
    """[T] u >= 0 of length 1 with u^T gram u as great as can be reached from a single task."""
    found = torch.eye(len(gram), dtype=torch.float64)
    reached = gram.diagonal()
    for _ in range(PCA_STEPS):
        stepped = (gram @ found).clamp_min(0)
        found = stepped / stepped.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        before, reached = reached, (found * (gram @ found)).sum(dim=0)
        if (reached - before).max() <= PCA_SETTLED * gram.trace():
            break
    return found[:, reached.argmax()]


def _unused(encoder: Tensor) -> Tensor:
    """[T] the single task that the bases hold least of."""
    return torch.eye(len(encoder), dtype=torch.float64)[encoder.sum(dim=1).argmin()]
