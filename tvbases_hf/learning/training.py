"""Fine-tuning on one task, which makes a task vector, or jointly on several, the upper baseline of merging."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ParameterError
from ..storage.run import bar
from .data import TaskData

Model = TypeVar("Model", bound=nn.Module)


def fine_tune(
    model: Model,
    tasks: TaskData | Sequence[TaskData],
    *,
    lr: float = 5e-5,
    epochs: int = 1,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
) -> Model:
    """Train ``model`` in place and return it.

    AdamW with linear warm-up and decay, and gradients clipped to the length ``clip``. Several tasks are trained
    jointly, their batches interleaved; every task is then seen as often as alone. Weights that need no gradient stay.
    Dropout is on or off as the model has it (``model.eval()``: off).

    Raises:
        ParameterError: no data, no weight to train, a parameter outside its domain; a loss that is NaN or infinite.
    """
    tasks = [tasks] if isinstance(tasks, TaskData) else list(tasks)
    total = epochs * sum(_length(task) for task in tasks)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    _check(lr, epochs, warmup, total, len(weights))
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, fused=True)  # one pass over the weights
    warm = max(1, round(warmup * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / warm, (total - k) / total))
    title = f"Fine-tuning {tasks[0].name}" if len(tasks) == 1 else f"Fine-tuning {len(tasks)} tasks jointly"
    with bar(title, total, "step") as shown:
        for epoch in range(epochs):
            for task, batch in interleaved(tasks, seed + epoch):
                loss = task.loss(model, batch)
                if not math.isfinite(loss.item()):
                    raise ParameterError(
                        f'the loss of "{task.name}" is {loss.item()} after {shown.n} steps; lower lr ({lr:g}) or check '
                        "the data"
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(weights, clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                shown.update()
    return model


def interleaved(tasks: Sequence[TaskData], seed: int = 0) -> Iterator[tuple[TaskData, Any]]:
    """(task, batch): every batch of every task once, the tasks in a random order that the seed decides.

    Within a task the order is that of its data: a DataLoader with shuffle=True gives another one in every epoch.
    """
    turns = [task for task in tasks for _ in range(_length(task))]
    readers = [iter(task.batches) for task in tasks]
    of = {id(task): reader for task, reader in zip(tasks, readers, strict=True)}
    for turn in torch.randperm(len(turns), generator=torch.Generator().manual_seed(seed)).tolist():
        yield turns[turn], next(of[id(turns[turn])])


def _length(task: TaskData) -> int:
    return len(task.batches) if isinstance(task.batches, Sized) else sum(1 for _ in task.batches)


def _check(lr: float, epochs: int, warmup: float, steps: int, weights: int) -> None:
    if not lr > 0 or epochs < 1 or not 0 <= warmup <= 1:
        raise ParameterError(f"lr {lr:g} must be positive, epochs {epochs} at least 1, warmup {warmup:g} in [0, 1]")
    if not steps:
        raise ParameterError("there is nothing to train on: no task, or no batch in any")
    if not weights:
        raise ParameterError("there is nothing to train: no weight of the model needs a gradient")
