"""AdaMerging (Yang et al., 2024): coefficients that make the merged model sure of its answers, without labels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta
from ..errors import ParameterError
from ..merging.apply import decomposed
from ..methods.devec import Options
from ..models.vectors import Vectors
from .combination import Learned, learn
from .data import TaskData
from .learned import paired

START = 0.3
LEARNING_RATE = 1e-3
STEPS = 500


def adamerging(
    vectors: Vectors,
    model: nn.Module,
    data: Sequence[TaskData],
    *,
    per: str = "weight",
    start: float | Sequence[float] = START,
    lr: float = LEARNING_RATE,
    steps: int = STEPS,
) -> Learned:
    """argmin over c of the entropy of the answers of theta_0 + {sum_k c_k^l B_k^l}_l to unlabelled data.

    Adam from the same coefficient everywhere, as the authors have it (0.3, 1e-3, 500 steps with one batch of every
    task); labels, where there are some, are not looked at. For what is held in memory see Mixture.

    Args:
        per: how many coefficients a vector has: one (``task``), one per transformer block (``layer``), or one per
            weight tensor (``weight``), which is what the authors' layer-wise code does.
        start: one for all vectors, or one for each.

    Raises:
        ParameterError: data that does not fit the tasks or is empty, or an option out of range.
        MismatchError: the model is not the base.
    """
    ordered = [task for _, task in paired(vectors, data)]
    return learn(
        vectors,
        model,
        ordered,
        TaskData.entropy,
        per=per,
        start=start,
        steps=steps,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        method="adamerging",
        title="AdaMerging",
    )


def with_shared(vectors: Vectors, options: Options | None = None) -> Vectors:
    """The vectors, and after them the component that each pair of them shares (DeVec, merging protocol).

    A pair counts half to each of the two. The shared components, of low rank, are kept once they are computed: one
    thin SVD per vector and weight. ParameterError for fewer than two vectors, or a pool other than ``pairs``.
    """
    options = options or Options(pool="pairs")
    if options.pool != "pairs" or len(vectors) < 2:
        raise ParameterError(
            f"shared components are those of pairs: pool must be pairs and vectors at least 2; got {options.pool} and "
            f"{len(vectors)}"
        )
    pairs = list(itertools.combinations(range(len(vectors)), 2))

    @functools.cache
    def shared(name: str) -> tuple[Delta, ...]:
        return decomposed(vectors, name, options).pairwise

    labels = tuple(f"{vectors.labels[i]} & {vectors.labels[j]}" for i, j in pairs)
    encoder = torch.stack([_half(vectors.encoder, i, j) for i, j in pairs], dim=1)
    return replace(
        vectors,
        labels=vectors.labels + labels,
        encoder=torch.cat([vectors.encoder, encoder], dim=1),
        read=lambda name: [*vectors.deltas(name), *shared(name)],
    )


def _half(encoder: Tensor, i: int, j: int) -> Tensor:
    return (encoder[:, i] + encoder[:, j]) / 2
