"""DeVec's merging protocol: learned coefficients, one for each vector and one for what each pair of them shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..methods.devec import Options
from ..models.vectors import Vectors
from .adamerging import START, with_shared
from .atlas import EPOCHS, atlas
from .combination import Learned
from .data import TaskData

PAIRS = Options(pool="pairs")
LEARNING_RATE = 0.02


def devec(
    vectors: Vectors,
    model: nn.Module,
    data: Sequence[TaskData],
    *,
    options: Options = PAIRS,
    start: float = START,
    lr: float = LEARNING_RATE,
    epochs: int = EPOCHS,
) -> Learned:
    """theta_0 + sum_i a_i tau_i + sum_{i<j} b_ij shared_ij at the a and b of the least loss (Table 1 of the paper).

    Task arithmetic (all a equal, all b 0) is where it starts; T + T (T - 1) / 2 coefficients follow the loss on
    ``data``, a few labelled examples of each task, or of a new one. For what is held in memory see Mixture.

    Args:
        options: how pairs are decomposed; their pool is ``pairs``.
        start: a of all vectors before the first step.

    Raises as ``atlas`` and ``with_shared`` do.
    """
    together = with_shared(vectors, options)
    starts = [start] * len(vectors) + [0.0] * (len(together) - len(vectors))
    found = atlas(together, model, data, per="task", start=starts, lr=lr, weight_decay=0.0, epochs=epochs)
    return replace(found, method="devec")
