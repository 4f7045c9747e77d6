"""How much of a change to add: one alpha for all vectors, or one alpha >= 0 for each, chosen on validation data.

M convex bases are shorter than T task vectors by T / M, so the grid goes beyond 1; a search that walks it upwards stops
when it is past the optimum, so the long grid costs nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..algebra.sums import total
from ..errors import ParameterError
from ..models.vectors import Vectors
from ..storage.run import bar
from .curve import Curve, score_of
from .data import TaskData
from .inplace import Change, InPlace

# The papers' 0, 0.05, ... 1 and on; a step is never more than an eighth of alpha from 1 onwards.
ALPHAS = (
    *(i / 20 for i in range(21)),
    *(i / 10 for i in range(11, 21)),
    *(i / 4 for i in range(9, 17)),
    *(i / 2 for i in range(9, 17)),
)
NON_NEGATIVE = (0.0, math.inf)
PATIENCE = 4

Metrics = Callable[[nn.Module], Mapping[str, float]]
"""What a model is worth, by task; higher is better (a loss with its sign turned)."""


def accuracies(tasks: Sequence[TaskData]) -> Metrics:
    """The accuracy on every task. Raises ParameterError for none, or for two of one name."""
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ParameterError(f"data of tasks with names of their own are needed; got {', '.join(names) or 'none'}")
    return lambda model: {task.name: task.accuracy(model) for task in tasks}


def grid_search(
    place: InPlace,
    change: Change,
    metrics: Metrics,
    *,
    alphas: Sequence[float] = ALPHAS,
    start: float | None = None,
    patience: int = PATIENCE,
    domain: tuple[float, float] = NON_NEGATIVE,
    own: Mapping[str, float] | None = None,
) -> Curve:
    """The alpha of the best mean metric of theta_0 + alpha * change, and all that was evaluated on the way.

    The grid is walked from ``start`` (its first value by default), down and then up, until ``patience`` values in a row
    are worse than the best; equal ones are walked over. Of equally good alphas the one met first is chosen. A NaN is
    the worst value. Give ``functools.cache(change)`` if the change is expensive to compute and fits into memory.

    Args:
        domain: the least and the greatest alpha that the method knows.
        own: the metrics of the tasks' own models; with them normalised accuracies are compared.

    Raises:
        ParameterError: an alpha outside the domain, a grid that is empty or not ascending, metrics that are all NaN.
    """
    grid = check_alphas(alphas, domain)
    if patience < 1:
        raise ParameterError(f"patience is a number of values, 1 or more; got {patience}")
    first = min(range(len(grid)), key=lambda i: abs(grid[i] - start)) if start is not None else 0
    found: dict[int, dict[str, float]] = {}
    with bar("Searching alpha", len(grid), "model") as shown:

        def score(index: int) -> float:
            with place.changed(change, grid[index]) as model:
                found[index] = dict(metrics(model))
            value = score_of(found[index], own)
            shown.set_postfix(alpha=f"{grid[index]:g}", metric=f"{value:.4g}")
            shown.update()
            return value

        best = climb(score, len(grid), first, patience=patience, plateaus=True)
    return Curve.of({grid[index]: found[index] for index in sorted(found)}, grid[best], own)


def climb(
    score: Callable[[int], float], count: int, start: int = 0, *, patience: int = 1, plateaus: bool = False
) -> int:
    """Index of the best score on both sides of ``start``, each side left after ``patience`` misses in a row.

    A miss is a score that is no better than the best so far; with ``plateaus`` it has to be worse. NaN is the worst.
    """
    known: dict[int, float] = {}

    def at(index: int) -> float:
        if index not in known:
            value = score(index)
            known[index] = -math.inf if math.isnan(value) else value
        return known[index]

    at(start)
    best = start
    for step in (-1, 1):
        index, misses = best, 0
        while misses < patience and 0 <= index + step < count:
            index += step
            if at(index) > at(best):
                best, misses = index, 0
            elif at(index) < at(best) or not plateaus:
                misses += 1
    return best


@dataclass(frozen=True)
class Coefficients:
    """One alpha per vector, what the tasks weigh then (encoder @ alpha), and what it is worth."""

    labels: tuple[str, ...]
    alphas: tuple[float, ...]
    weights: dict[str, float]
    metrics: dict[str, float]
    score: float
    evaluations: int


def coordinate_search(
    place: InPlace,
    vectors: Vectors,
    metrics: Metrics,
    common: float,
    *,
    alphas: Sequence[float] = ALPHAS,
    sweeps: int = 2,
    patience: int = 2,
    own: Mapping[str, float] | None = None,
) -> Coefficients:
    """alpha_m >= 0 for every vector, one after another, from the best common alpha; never worse than that one.

    Each coefficient climbs the grid until ``patience`` values in a row are no better than the best, in at most
    ``sweeps`` rounds; a round that changes nothing is the last. Some 2 * patience * K evaluations a round.

    Raises ParameterError for negative alphas.
    """
    grid = check_alphas(sorted({*alphas, common}), NON_NEGATIVE)
    known: dict[tuple[int, ...], dict[str, float]] = {}
    position = [grid.index(common)] * len(vectors)
    with bar("Searching alphas", None, "model") as shown:

        def score(positions: Sequence[int]) -> float:
            key = tuple(positions)
            if key not in known:
                with place.changed(summed(vectors, [grid[i] for i in key])) as model:
                    known[key] = dict(metrics(model))
                shown.update()
            return score_of(known[key], own)

        for _ in range(sweeps):
            before = list(position)
            for m in range(len(vectors)):
                position[m] = climb(_along(score, position, m), len(grid), position[m], patience=patience)
            if position == before:
                break
        best = score(position)
    chosen = tuple(grid[i] for i in position)
    weights = vectors.encoder @ torch.tensor(chosen, dtype=torch.float64)
    return Coefficients(
        vectors.labels,
        chosen,
        dict(zip(vectors.tasks, weights.tolist(), strict=True)),
        known[tuple(position)],
        best,
        len(known),
    )


def _along(score: Callable[[Sequence[int]], float], position: Sequence[int], m: int) -> Callable[[int], float]:
    return lambda i: score([*position[:m], i, *position[m + 1 :]])


def summed(vectors: Vectors, alphas: Sequence[float] | None = None) -> Change:
    """sum_m alpha_m B_m, one weight at a time: task arithmetic. All alphas are 1 if none are given."""
    coefficients = [1.0] * len(vectors) if alphas is None else list(alphas)
    if len(coefficients) != len(vectors):
        raise ParameterError(f"{len(coefficients)} coefficients for {len(vectors)} vectors; give one for each")
    return lambda name: total(vectors.deltas(name), coefficients)


def check_alphas(alphas: Sequence[float], domain: tuple[float, float]) -> tuple[float, ...]:
    """An ascending grid inside a method's domain, or ParameterError."""
    grid = tuple(float(alpha) for alpha in alphas)
    low, high = domain
    outside = [alpha for alpha in grid if not (math.isfinite(alpha) and low <= alpha <= high)]
    if outside:
        raise ParameterError(
            f"{len(outside)} of {len(grid)} alphas are outside what the method knows, {low:g} to {high:g} (first: "
            f"{outside[0]:g}); to take a task away, negate it"
        )
    if not grid or any(a >= b for a, b in itertools.pairwise(grid)):
        raise ParameterError("the grid of alphas has to hold at least one number, each greater than the one before")
    return grid
