"""What the merging methods that need data have in common: their inputs, checked, and the model that is asked.

None of them writes to the model: it is asked with other weights (`inplace.Reparametrised`), so that it holds theta_0 at
any moment, whatever happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta, dense
from ..algebra.sums import total
from ..errors import MismatchError, ParameterError
from ..models.vectors import Vectors
from .data import TaskData
from .inplace import Change, weights_of


def paired(vectors: Vectors, data: Sequence[TaskData]) -> list[tuple[int, TaskData]]:
    """(number of the task, its data) in the order of the tasks, for every task that has a share in the vectors.

    Raises ParameterError for tasks without data, data of tasks that are not there, and two sets of data for one task.
    """
    names = [given.name for given in data]
    unknown = [name for name in names if name not in vectors.tasks]
    if unknown:
        raise ParameterError(
            f"{len(unknown)} of {len(names)} data sets belong to no task (first: {unknown[0]}); the tasks are "
            + ", ".join(vectors.tasks)
        )
    doubled = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if doubled:
        raise ParameterError(f'{names.count(doubled[0])} data sets are named "{doubled[0]}"; give one per task')
    shares = vectors.encoder.abs().sum(dim=1)
    needed = [task for task, share in zip(vectors.tasks, shares.tolist(), strict=True) if share > 0]
    absent = [task for task in needed if task not in names]
    if absent:
        raise ParameterError(
            f"{len(absent)} of {len(needed)} tasks have no data (first: {absent[0]}); give a TaskData of that name"
        )
    return [(i, data[names.index(task)]) for i, task in enumerate(vectors.tasks) if task in needed]


@contextlib.contextmanager
def asking(vectors: Vectors, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The model's own weights theta_0 by name, not to be written to; until the end it is in evaluation mode.

    Raises MismatchError if the model has not the weights of the base, or two names for one that the base has twice.
    """
    weights = {name: weight.detach() for name, weight in weights_of(model, vectors.names).items()}
    _check_tied(vectors, weights)
    _check_base(vectors, weights)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            yield weights
    finally:
        for module in training:
            module.training = True


def moved(weights: Mapping[str, Tensor], change: Change) -> dict[str, Tensor]:
    """theta_0 + change(name), each sum in float64 and rounded once to the weight's dtype: leaves with a gradient.

    Holds one more copy of the weights.
    """
    found = {}
    for name, weight in weights.items():
        added = change(name)
        added = (added if isinstance(added, Tensor) else dense(added)).to(weight.device, torch.float64)
        total = weight.to(torch.float64) + added.reshape(weight.shape)
        found[name] = total.to(weight.dtype).requires_grad_()
    return found


def task_changes(vectors: Vectors, at: Vectors | None) -> list[Change | None]:
    """[T] how far from theta_0 the statistics of each task's data are measured; None for a task without any share.

    ``at`` gives one vector per task: the task vectors themselves, or reconstructions. Without it, it is the mean of the
    vectors weighted by their shares of the task, which needs nothing but the vectors: for task vectors and for
    reconstructions, the vector itself.

    Raises ParameterError if ``at`` has not one vector for each task.
    """
    if at is not None:
        if at.tasks != vectors.tasks or len(at) != len(vectors.tasks):
            raise ParameterError(
                f"at must hold one vector for each of the {len(vectors.tasks)} tasks, in their order; it has {len(at)} "
                f"for {', '.join(at.tasks)}"
            )
        return [_combined(at, [float(i == j) for j in range(len(at))]) for i in range(len(at))]
    shares = vectors.encoder.clamp_min(0)
    totals = shares.sum(dim=1)
    return [
        _combined(vectors, (row / total).tolist()) if total > 0 else None
        for row, total in zip(shares, totals, strict=True)
    ]


def combined(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """sum_k w_k delta_k, for which a vector of weight 0 is not read."""
    kept = [k for k, weight in enumerate(weights) if weight != 0] or [0]
    return total([deltas[k] for k in kept], [weights[k] for k in kept])


def held(vectors: Vectors) -> Vectors:
    """The same vectors with their changes in memory: bases that are mixed from task vectors are mixed once.

    K float32 copies of what is dense, factors of what is not; task vectors stay in their files.
    """
    known = {name: vectors.deltas(name) for name in vectors.names}
    return replace(vectors, read=lambda name: list(known[name]))


def gradients(loss: Tensor, leaves: Mapping[str, Tensor], keep: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, gradient) of every weight that the loss depends on. ``keep`` the graph for another call."""
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=keep, allow_unused=True)
    return ((name, gradient) for name, gradient in zip(leaves, found, strict=True) if gradient is not None)


def mean_change(vectors: Vectors, name: str) -> Tensor:
    """The plain mean of the K changes of one weight, float64."""
    count = len(vectors)
    return dense(total(vectors.deltas(name), [1 / count] * count)).reshape(vectors.base.tensors[name].shape)


def _combined(vectors: Vectors, weights: list[float]) -> Change:
    return lambda name: combined(vectors.deltas(name), weights)


def _check_tied(vectors: Vectors, weights: Mapping[str, Tensor]) -> None:
    first: dict[tuple[int, torch.Size], str] = {}
    for name, weight in weights.items():
        other = first.setdefault((weight.data_ptr(), weight.shape), name) if weight.numel() else name
        if other != name:
            raise MismatchError(
                f"{other} and {name} are one weight in the model and two in the base "
                f"({vectors.base.label}); leave {name} out of the base's tensors, as save_pretrained does"
            )


def _check_base(vectors: Vectors, weights: Mapping[str, Tensor]) -> None:
    others = [
        name
        for name, weight in weights.items()
        if not torch.equal(weight.cpu(), vectors.base.read(name).to(weight.dtype).reshape(weight.shape))
    ]
    if others:
        raise MismatchError(
            f"{len(others)} of {len(weights)} weights of the model are not those of the base ({vectors.base.label}; "
            f"first: {others[0]}); changes are added to the base, so load the model from there"
        )
