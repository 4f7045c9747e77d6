"""aTLAS (Zhang et al., 2024): block coefficients learned from a few labelled examples, of these tasks or of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import ParameterError
from ..models.vectors import Vectors
from .combination import Learned, learn, steps_of
from .data import TaskData

LEARNING_RATE = 0.1
WEIGHT_DECAY = 0.1
EPOCHS = 10
# Where squares start: their slope at 0 is 0, so they could not leave it.
NONNEGATIVE_START = 0.1


def atlas(
    vectors: Vectors,
    model: nn.Module,
    data: Sequence[TaskData],
    *,
    nonnegative: bool = False,
    per: str = "weight",
    start: float | Sequence[float] | None = None,
    lr: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
    epochs: int = EPOCHS,
) -> Learned:
    """argmin over the blocks' coefficients Lambda_k of the loss of theta_0 + sum_k Lambda_k B_k (AE paper, Table 5).

    AdamW whose learning rate falls to 0 by half a cosine, from coefficients 0 (AE paper, appendix F.3). The data is
    that of the vectors' tasks or of a new one (few-shot out of domain): its names are not looked at. With
    ``per="task"`` this is task arithmetic with a coefficient per vector. For what is held in memory see Mixture.

    Args:
        nonnegative: aTLAS>=0, whose coefficients are squares of the parameters; it starts at NONNEGATIVE_START.
        per: one coefficient per vector and ``weight`` tensor (the paper's blocks), transformer ``layer`` or ``task``.

    Raises:
        ParameterError: no data, data without labels, or an option out of range.
        MismatchError: the model is not the base.
    """
    if not data:
        raise ParameterError("no data given; aTLAS learns from labelled examples, a few per class")
    if epochs < 1:
        raise ParameterError(f"epochs must be at least 1, got {epochs}")
    if start is None:
        start = NONNEGATIVE_START if nonnegative else 0.0
    return learn(
        vectors,
        model,
        data,
        TaskData.loss,
        per=per,
        start=start,
        steps=max(1, steps_of(data, epochs)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
        cosine=True,
        squared=nonnegative,
        method="atlas",
        title="aTLAS",
    )
