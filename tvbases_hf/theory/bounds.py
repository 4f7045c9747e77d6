"""Both sides of the AE paper's error bounds, measured: what merged models lose on given data, and what they may lose.

Every model in the theorems is theta_0 + sum_i w_i tau_i: a merge over bases has w = encoder @ alpha, the negation of a
reconstruction w = -alpha R[:, i]. So distances come from the Gram matrix, and one evaluator in place serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.delta import dense
from ..algebra.sums import total
from ..bases import ae_bases
from ..errors import ParameterError, did_you_mean
from ..learning.inplace import Change, InPlace
from ..models.gram import Gram, gram_matrix
from ..models.vectors import Vectors
from ..storage.run import bar
from .hessian import MAX_ITERATIONS, TOLERANCE, Terms, TopEigenvalue, gradient, mean_loss, top_eigenvalue
from .theorems import (
    Constants,
    addition_bound,
    alignment,
    basis_negation_bound,
    constants,
    coverage,
    negation_bound,
    ood_bound,
)

# Of loss and distance, both of which are sums of many rounded numbers.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Curvature:
    """Of a task's loss at its own model: L, how well that is known, and the gradient's length, which should be 0."""

    task: str
    smoothness: float
    top: TopEigenvalue
    gradient: float
    loss: float
    base_loss: float


@dataclass(frozen=True)
class Side:
    """One inequality: ``measured`` <= ``bound`` for the loss of ``task``; ``other`` is what is added or forgotten.

    ``broken`` are the theorem's assumptions that are not true here; without any the inequality is certain. B.2 (the
    gradient at theta_i is 0) counts as true if the ``linear`` term <gradient, theta - theta_i>, which it removes, does
    not add to the loss; B.3 (smoothness) if it is true at the merged model, the only place where the proof uses it.
    """

    theorem: str
    over: str
    task: str
    other: str
    measured: float
    bound: float
    linear: float
    broken: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound


@dataclass(frozen=True)
class Bounds:
    """Everything measured; ``to_json`` for programs, tables of the command line for people."""

    tasks: tuple[str, ...]
    num_bases: int
    constants: Constants
    curvatures: tuple[Curvature, ...]
    sides: tuple[Side, ...]

    def to_json(self) -> dict[str, Any]:
        sides = [{**asdict(side), "holds": side.holds} for side in self.sides]
        return {**asdict(self), "sides": sides}


def measure_bounds(
    model: nn.Module,
    vectors: Vectors,
    losses: Mapping[str, Terms],
    num_bases: int,
    *,
    gram: Gram | None = None,
    alpha: float = 1.0,
    balance: bool = True,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    seed: int = 0,
) -> Bounds:
    """Theorems 3.5 to 3.7, both sides, for every task that has a loss.

    Addition with alpha_i = 1 / T, over bases with 1 / M; OOD: each task as the target, the others (and bases of them)
    as the sources; negation of every other task, of which the worst is reported, with ``alpha``.

    Args:
        model: theta_0, whose weights are bit-identical afterwards; float32 at least.
        losses: by task, for example cross_entropy(data).

    Raises:
        ParameterError: a loss of a task that there is not, none at all, an alpha outside [0, 1].
        MismatchError: a model without the weights that the task vectors change.
    """
    unknown = [task for task in losses if task not in vectors.tasks]
    if unknown or not losses:
        given = f'"{unknown[0]}"{did_you_mean(unknown[0], vectors.tasks)}' if unknown else "no task"
        raise ParameterError(f"data was given for {given}; the tasks are {', '.join(vectors.tasks)}")
    if not 0 <= alpha <= 1:
        raise ParameterError(f"the theorem on negation is about alpha in [0, 1], got {alpha:g}")
    gram = gram or gram_matrix(vectors)
    found = constants(gram.matrix, num_bases)
    lab = _Lab(InPlace(model, vectors.names), vectors, gram.matrix, losses)
    options = {"tolerance": tolerance, "max_iterations": max_iterations, "seed": seed}
    with lab.shown:
        curved = {task: lab.curvature(task, options) for task in losses}
        theorems = _Theorems(lab, curved, found, num_bases, alpha, balance)
        sides = [*theorems.addition(), *theorems.ood(), *theorems.negation()]
    return Bounds(vectors.tasks, num_bases, found, tuple(curved.values()), tuple(sides))


class _Lab:
    """Evaluates theta_0 + sum_i w_i tau_i, each once, and knows gradients and distances."""

    def __init__(self, place: InPlace, vectors: Vectors, gram: Tensor, losses: Mapping[str, Terms]) -> None:
        self.place, self.vectors, self.gram, self.losses = place, vectors, gram, losses
        self.eye = torch.eye(len(vectors), dtype=torch.float64)
        self.shown = bar("Measuring bounds", None, "model")
        self._known: dict[tuple[float, ...], dict[str, float]] = {}
        self._slopes: dict[str, Tensor] = {}

    def index(self, task: str) -> int:
        return self.vectors.tasks.index(task)

    def own(self, task: str) -> Tensor:
        return self.eye[self.index(task)]

    def change(self, weights: Tensor) -> Change:
        return lambda name: total(self.vectors.deltas(name), weights.tolist())

    def loss(self, weights: Tensor, task: str) -> float:
        key = tuple(round(weight, 12) for weight in weights.tolist())
        if key not in self._known:
            with self.place.changed(self.change(weights)) as model:
                self._known[key] = {name: mean_loss(model, terms) for name, terms in self.losses.items()}
            self.shown.update()
        return self._known[key][task]

    def curvature(self, task: str, options: dict[str, Any]) -> Curvature:
        names, terms, own = self.vectors.names, self.losses[task], self.own(task)
        with self.place.changed(self.change(own)) as model:
            slope = gradient(model, names, terms)
            top = top_eigenvalue(model, names, terms, **options)
        self._slopes[task] = self._inner(slope)
        base = self.loss(torch.zeros_like(own), task)
        return Curvature(task, abs(top.value), top, float(slope.norm()), self.loss(own, task), base)

    def _inner(self, slope: Tensor) -> Tensor:
        """[T] <slope, tau_i>."""
        sizes = [self.place.weights[name].numel() for name in self.vectors.names]
        total = torch.zeros(len(self.vectors), dtype=torch.float64)
        for name, part in zip(self.vectors.names, slope.split(sizes), strict=True):
            total += torch.stack([part @ dense(delta).reshape(-1) for delta in self.vectors.deltas(name)])
        return total

    def linear(self, weights: Tensor, task: str) -> float:
        return float(self._slopes[task] @ (weights - self.own(task)))

    def square_distance(self, weights: Tensor, task: str) -> float:
        apart = weights - self.own(task)
        return float((apart @ self.gram @ apart).clamp_min(0))


@dataclass(frozen=True)
class _Theorems:
    lab: _Lab
    curved: dict[str, Curvature]
    found: Constants
    num_bases: int
    alpha: float
    balance: bool

    def addition(self) -> list[Side]:
        count = len(self.lab.vectors)
        encoder = ae_bases(self.lab.gram, self.num_bases, balance=self.balance).encoder
        merges = {"tasks": torch.full((count,), 1 / count, dtype=torch.float64), "bases": encoder.mean(1)}
        return [
            self._side(
                "3.5", over, task, "all", weights, addition_bound(at.smoothness, self.found.c, self.found.epsilon)
            )
            for over, weights in merges.items()
            for task, at in self.curved.items()
        ]

    def ood(self) -> list[Side]:
        if len(self.lab.vectors) < 2:
            return []
        return [side for task in self.curved for side in self._ood(task)]

    def _ood(self, task: str) -> list[Side]:
        """Each task as the target, the others as sources."""
        tasks = self.lab.vectors.tasks
        sources = [index for index, name in enumerate(tasks) if name != task]
        inner = self.lab.gram[self.lab.index(task), sources]
        best, gamma = alignment(inner, self.found.c)
        reduced = self.lab.gram[sources][:, sources]
        encoder = ae_bases(reduced, min(self.num_bases, len(sources)), balance=self.balance).encoder
        basis, rho = coverage(encoder, best)
        weights = torch.zeros(len(tasks), dtype=torch.float64)
        weights[sources] = encoder[:, basis]
        smoothness, source = self.curved[task].smoothness, tasks[sources[best]]
        far = () if gamma > 0 else ("no source resembles the target",)
        opposed = () if bool((inner >= 0).all()) else ("a source opposes the target",)
        plain, mixed = ood_bound(smoothness, self.found.c, gamma), ood_bound(smoothness, self.found.c, gamma, rho)
        return [
            self._side("3.6", "tasks", task, source, self.lab.eye[sources[best]], plain, far),
            self._side("3.6", "bases", task, source, weights, mixed, (*far, *opposed)),
        ]

    def negation(self) -> list[Side]:
        if len(self.lab.vectors) < 2:
            return []
        weights = ae_bases(self.lab.gram, self.num_bases, balance=self.balance)
        rebuilt = weights.reconstruction
        error = rebuilt - self.lab.eye
        residuals = (error * (self.lab.gram @ error)).sum(0).clamp_min(0).tolist()
        attained = weights.loss <= weights.spectral_bound * (1 + ROUNDING) + ROUNDING * weights.total
        short = () if attained else ("the bases miss the spectral bound",)
        sides = []
        for task, at in self.curved.items():
            curved, c, epsilon = at.smoothness, self.found.c, self.found.epsilon
            plain = negation_bound(curved, c, epsilon)
            spectral = basis_negation_bound(curved, c, epsilon, self.found.tail)
            others = [index for index, name in enumerate(self.lab.vectors.tasks) if name != task]
            exact = [basis_negation_bound(curved, c, epsilon, residuals[index]) for index in others]
            sides += [
                self._worst("3.7", "tasks", task, others, self.lab.eye, [plain] * len(others), ()),
                self._worst("B.10", "bases", task, others, rebuilt, exact, ()),
                self._worst("3.7", "bases", task, others, rebuilt, [spectral] * len(others), short),
            ]
        return sides

    def _worst(
        self,
        theorem: str,
        over: str,
        task: str,
        others: list[int],
        rebuilt: Tensor,
        bounds: list[float],
        broken: tuple[str, ...],
    ) -> Side:
        """Of all tasks that can be forgotten, the one that comes nearest to the bound, or exceeds it most."""
        start, tasks = self.curved[task].base_loss, self.lab.vectors.tasks
        sides = [
            self._side(theorem, over, task, tasks[i], -self.alpha * rebuilt[:, i], bound, broken, start)
            for i, bound in zip(others, bounds, strict=True)
        ]
        return max(sides, key=lambda side: side.measured - side.bound)

    def _side(
        self,
        theorem: str,
        over: str,
        task: str,
        other: str,
        weights: Tensor,
        bound: float,
        broken: tuple[str, ...] = (),
        start: float | None = None,
    ) -> Side:
        """``start`` is the loss that the measured one is compared with; the task's own if None."""
        at, loss = self.curved[task], self.lab.loss(weights, task)
        linear = self.lab.linear(weights, task)
        ceiling = at.loss + linear + at.smoothness / 2 * self.lab.square_distance(weights, task)
        if linear > ROUNDING * bound:
            broken = (*broken, "B.2: the gradient is not 0")
        if loss > ceiling + ROUNDING * (abs(loss) + abs(at.loss)):
            broken = (*broken, "B.3: the loss is more curved elsewhere")
        if start is not None and at.loss > at.base_loss + at.smoothness * self.found.c / 2:
            broken = (*broken, "fine-tuning has raised the loss")
        measured = loss - (at.loss if start is None else start)
        return Side(theorem, over, task, other, measured, bound, linear, broken)
