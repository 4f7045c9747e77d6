"""The ways to keep fewer vectors than there are tasks, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tvbases_hf.bases import BasisWeights, ae_bases, pca_bases, pca_positive
from tvbases_hf.demo.compare import selections
from tvbases_hf.vectors import Vectors

from .workshop import Workshop

ALL = "all"
SIDES = ("bases", "reconstructions")

# (Gram matrix, M, number of the draw) -> bases
KINDS: dict[str, Callable[[Tensor, int, int], BasisWeights]] = {
    "balanced": lambda gram, m, draw: ae_bases(gram, m, seed=draw),
    "normalize": lambda gram, m, draw: ae_bases(gram, m, normalize=True, seed=draw),
    "ae_varpro": lambda gram, m, draw: ae_bases(gram, m, balance=False, seed=draw),
    "ae_adam": lambda gram, m, draw: ae_bases(gram, m, solver="adam", balance=False, seed=draw),
    "rand_select": lambda gram, m, draw: list(selections(gram, m, draw + 1))[draw],
    "pca": lambda gram, m, draw: pca_bases(gram, m),
    "pca_positive": lambda gram, m, draw: pca_positive(gram, m),
}
TITLES = {
    ALL: "all task vectors",
    "balanced": "AE, balanced",
    "normalize": "AE, balanced, normalised",
    "ae_varpro": "AE of the paper, varpro",
    "ae_adam": "AE of the paper, Adam",
    "rand_select": "RandSelect",
    "pca": "PCA",
    "pca_positive": "PCA ≥ 0",
}


def weights_of(workshop: Workshop, kind: str, num_bases: int, seed: int = 0, draw: int = 0) -> BasisWeights:
    """Encoder [T, M] and decoder [M, T] of the task vectors of one fine-tuning seed."""
    return KINDS[kind](workshop.gram(seed), num_bases, draw)


def vectors_of(
    workshop: Workshop, kind: str, num_bases: int = 0, *, over: str = "bases", seed: int = 0, draw: int = 0
) -> Vectors:
    """The task vectors, their bases, or their reconstructions from these."""
    vectors = workshop.vectors(seed)
    if kind == ALL:
        return Vectors.of_tasks(vectors)
    return Vectors.mixed(vectors, weights_of(workshop, kind, num_bases, seed, draw), over)


def kept(kind: str, num_bases: int, over: str) -> int:
    """Vectors to keep on disk: PCA's reconstructions need its mean too."""
    return num_bases + (kind == "pca" and over == "reconstructions")


def bytes_of(vectors: Vectors, count: int) -> int:
    """Of ``count`` vectors in float32."""
    return 4 * count * sum(vectors.base.tensors[name].numel for name in vectors.names)


def random_span(num_tasks: int, num_bases: int, seed: int) -> Tensor:
    """[T, M] orthonormal columns: the span of M random mixtures of the task vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(num_tasks, num_bases, dtype=torch.float64, generator=generator))[0]


def even_span(gram: Tensor, num_bases: int, starts: int = 4) -> Tensor:
    """[T, M] mixtures whose span loses about as much of every task: the least sum of squares of the relative errors.

    A least-squares fit is free to keep some tasks whole and to give others up. Forgetting a task needs a part of its
    own vector, so that is the wrong thing for negation.
    """
    scale = gram.diagonal().rsqrt()
    cosine = scale[:, None] * gram * scale[None, :]
    best, chosen = math.inf, random_span(len(gram), num_bases, 0)
    for start in range(starts):
        mixtures = random_span(len(gram), num_bases, start).contiguous().requires_grad_()
        search = torch.optim.LBFGS([mixtures], max_iter=200, line_search_fn="strong_wolfe")

        def closure(mixtures: Tensor = mixtures, search: torch.optim.Optimizer = search) -> Tensor:
            search.zero_grad()
            loss = relative_errors(cosine, mixtures).square().sum()
            loss.backward()
            return loss

        search.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            value = float(relative_errors(cosine, mixtures).square().sum())
        if value < best:
            best, chosen = value, mixtures.detach()
    return scale[:, None] * chosen


def relative_errors(gram: Tensor, mixtures: Tensor) -> Tensor:
    """[T] |tau_hat - tau|^2 / |tau|^2 of the best reconstructions from the span of the mixtures [T, M]."""
    cross = gram @ mixtures
    inside = (cross * torch.linalg.solve(mixtures.T @ cross, cross.T).T).sum(1)
    return 1 - inside / gram.diagonal()
