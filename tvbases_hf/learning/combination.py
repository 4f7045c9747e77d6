"""Learned coefficients: theta_0 + sum_k c_k B_k, one coefficient per vector and block, by gradient descent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta, LowRank, dense
from ..algebra.sums import total
from ..errors import ParameterError
from ..models.positions import groups_of
from ..models.vectors import Vectors
from ..storage.run import bar
from .data import TaskData
from .inplace import Reparametrised
from .learned import asking, gradients

PER = ("task", "layer", "weight")
Loss = Callable[[TaskData, Any, Any], Tensor]


@dataclass(frozen=True)
class Learned:
    """One coefficient per vector and block: ``values`` [K, L] float64, ``blocks`` {weight: its block}.

    ``losses`` is the mean over the tasks at every step. Nothing of a weight's size is held: changes are added up when
    they are asked for.
    """

    vectors: Vectors
    values: Tensor
    blocks: Mapping[str, int]
    losses: tuple[float, ...]
    method: str = "learned coefficients"

    @property
    def made_of(self) -> Vectors:
        return self.vectors

    @property
    def names(self) -> tuple[str, ...]:
        return self.vectors.names

    def change(self, name: str) -> Delta:
        """sum_k c_k B_k of one weight; low-rank changes stay so."""
        return total(self.vectors.deltas(name), self.values[:, self.blocks[name]].tolist())


def blocks_of(names: Sequence[str], per: str, every: Iterable[str] = ()) -> dict[str, int]:
    """{weight: number of its block}: one block for ``task``, one per transformer block of each tower for ``layer`` (the
    rest is another), one per ``weight``. ``every`` weight of the model tells its towers; by default ``names`` are all.

    Raises ParameterError for another word.
    """
    if per not in PER:
        raise ParameterError(f"per must be one of {', '.join(PER)}; got {per!r}")
    groups = groups_of(every or names) if per == "layer" else {}
    keys = {name: groups.get(name, name) if per != "task" else "all" for name in names}
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: numbers[key] for name, key in keys.items()}


class Mixture:
    """theta_0 + sum_k c[k, block] B_k, and what a gradient in the weights is in the coefficients.

    Holds theta_0 (which is the model's own), the K changes, low-rank ones in their factors and dense ones in the
    model's dtype (float32 at least), and one copy of the weights.
    """

    def __init__(self, vectors: Vectors, weights: Mapping[str, Tensor], blocks: Mapping[str, int]) -> None:
        self.weights, self.blocks = weights, blocks
        self.shape = (len(vectors), max(blocks.values(), default=-1) + 1)
        self._parts = {name: _Part.of(vectors.deltas(name), weight) for name, weight in weights.items()}

    def leaves(self, values: Tensor) -> dict[str, Tensor]:
        """The merged weights, leaves with a gradient."""
        found = {}
        for name, weight in self.weights.items():
            total = self._parts[name].sum(weight, values[:, self.blocks[name]])
            found[name] = total.to(weight.dtype).requires_grad_()
        return found

    def gradient(self, sums: Mapping[str, Tensor]) -> Tensor:
        """[K, L] float64 from gradients in the weights: <g, B_k> summed over the weights of each block."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for name, gradient in sums.items():
            total[:, self.blocks[name]] += self._parts[name].inner(gradient).cpu()
        return total


@dataclass(frozen=True)
class _Part:
    """K changes of one weight: ``stacked`` [K', n] of the dense ones at positions ``where``, and factored ones."""

    where: list[int]
    stacked: Tensor | None
    factored: dict[int, LowRank]

    @classmethod
    def of(cls, deltas: Sequence[Delta], weight: Tensor) -> _Part:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        low = {k: delta.factors for k, delta in enumerate(deltas)}
        factored = {k: delta.to(weight.device, dtype) for k, delta in low.items() if delta is not None}
        where = [k for k in range(len(deltas)) if k not in factored]
        stacked = torch.stack([dense(deltas[k], dtype).reshape(-1) for k in where]) if where else None
        return cls(where, None if stacked is None else stacked.to(weight.device), factored)

    def sum(self, weight: Tensor, values: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if self.stacked is not None:
            total.view(-1).addmv_(self.stacked.T, values[self.where].to(total))
        for k, delta in self.factored.items():
            total.view(delta.shape).addmm_(delta.left * float(values[k]), delta.right)
        return total

    def inner(self, gradient: Tensor) -> Tensor:
        found = torch.zeros(len(self.where) + len(self.factored), dtype=torch.float64)
        if self.stacked is not None:
            found[self.where] = (self.stacked @ gradient.reshape(-1).to(self.stacked)).double().cpu()
        for k, delta in self.factored.items():
            projected = delta.left.T @ gradient.reshape(delta.shape).to(delta.left)
            found[k] = (projected * delta.right).sum(dtype=torch.float64)
        return found


def learn(
    vectors: Vectors,
    model: nn.Module,
    data: Sequence[TaskData],
    loss: Loss,
    *,
    per: str,
    start: float | Sequence[float],
    steps: int,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    cosine: bool = False,
    squared: bool = False,
    method: str = "learned coefficients",
    title: str = "Coefficients",
) -> Learned:
    """Coefficients that lower the mean over the tasks of ``loss``, one batch of each task per step.

    ``start`` is one coefficient for all or one per vector. ``squared``: the parameters' squares are the coefficients.
    ``cosine``: the learning rate falls to 0 over the steps, by half a cosine. Held: see Mixture, and one gradient.

    Raises ParameterError for steps below 1, a start of the wrong length or not above 0 for squares, and empty data.
    """
    if steps < 1:
        raise ParameterError(f"steps must be at least 1, got {steps}")
    blocks = blocks_of(vectors.names, per, vectors.base.tensors)
    with asking(vectors, model) as weights:
        mixture = Mixture(vectors, weights, blocks)
        parameters = _start(start, mixture.shape, squared).requires_grad_()
        descent = optimizer([parameters])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, steps) if cosine else None
        data = [task.fixed(model, vectors.names) for task in data]
        losses, rounds = [], [_forever(task) for task in data]
        with bar(title, steps, "step") as shown:
            for _ in range(steps):
                values = parameters.square() if squared else parameters * 1
                found, slope = loss_and_gradient(mixture, model, data, [next(r) for r in rounds], loss, values.detach())
                losses.append(found)
                descent.zero_grad()
                values.backward(slope)
                descent.step()
                if schedule is not None:
                    schedule.step()
                shown.update()
                shown.set_postfix(loss=f"{found:.4f}")
    final = parameters.detach()
    return Learned(vectors, final.square() if squared else final.clone(), blocks, tuple(losses), method)


def loss_and_gradient(
    mixture: Mixture, model: nn.Module, data: Sequence[TaskData], batches: Sequence[Any], loss: Loss, values: Tensor
) -> tuple[float, Tensor]:
    """Mean loss over the tasks, one batch each, and its gradient [K, L] in the coefficients ``values`` [K, L]."""
    leaves = mixture.leaves(values)
    asked = Reparametrised(model, leaves)
    total, sums = 0.0, {}
    for task, batch in zip(data, batches, strict=True):
        found = loss(task, asked, batch) / len(data)
        total += float(found.detach())
        for name, gradient in gradients(found, leaves):
            sums[name] = sums[name].add_(gradient) if name in sums else gradient
    return total, mixture.gradient(sums)


def steps_of(data: Sequence[TaskData], epochs: int) -> int:
    """Steps until the largest data set was seen ``epochs`` times."""
    lengths = [len(t.batches) if hasattr(t.batches, "__len__") else sum(1 for _ in t.batches) for t in data]  # type: ignore[arg-type]
    return epochs * max(lengths, default=0)


def _start(start: float | Sequence[float], shape: tuple[int, int], squared: bool) -> Tensor:
    given = torch.as_tensor(start, dtype=torch.float64)
    if given.ndim and given.shape != shape[:1]:
        raise ParameterError(
            f"start has {len(given)} coefficients, but there are {shape[0]} vectors; give one for each"
        )
    if squared and bool((given <= 0).any()):
        raise ParameterError("squared coefficients need a start above 0, where the square has a slope; for example 0.1")
    return (given.sqrt() if squared else given).reshape(-1, 1).expand(shape).clone()


def _forever(task: TaskData) -> Iterator[Any]:
    for epoch in itertools.count():
        count = 0
        for batch in task.batches:
            count += 1
            yield batch
        if not count:
            raise ParameterError(f'the data of "{task.name}" is empty' + (" when it is read again" if epoch else ""))
