"""Study: forgetting one task while the other seven keep 95 % of the base's accuracy (AE paper, Table 4).

The alpha is the largest of the grid at which they do so on validation sentences; the figures are of test sentences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from evidence.runner import Answer, Question, Study
from torch import Tensor

from tvbases_hf.algebra.delta import Dense
from tvbases_hf.algebra.sums import total
from tvbases_hf.bases import ae_bases, pca_bases
from tvbases_hf.bases.ae import fitted
from tvbases_hf.learning.inplace import Change

from .kinds import random_span
from .projection import rand_proj
from .settings import Settings
from .workshop import Workshop

KEEP = 0.95
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 8.0)
TITLES = {
    "true": "the task vector itself",
    "ae_adam": "AE of the paper",
    "balanced": "AE, balanced",
    "normalize": "AE, balanced, normalised",
    "even": "AE, balanced, even errors",
    "pca": "PCA, its mean counted among the M",
    "random_span": "random span of the task vectors",
    "rand_proj": "RandProj",
}


MAIN = ("true", "ae_adam", "even", "pca", "random_span", "rand_proj")


def questions(settings: Settings) -> Iterator[Question]:
    for kind in TITLES if settings.everything else MAIN:
        for task in settings.tasks:
            yield {"kind": kind, "task": task, "num_bases": settings.half}


def answer(workshop: Workshop, question: Question) -> Answer:
    task, kind = question["task"], question["kind"]
    index = workshop.settings.tasks.index(task)
    change, error = reconstruction(workshop, kind, question["num_bases"], index)
    change = functools.cache(change)
    before = _mean_without(workshop.zero_shot("val"), task)

    def keeps(alpha: float) -> bool:
        return _mean_without(workshop.changed(change, -alpha, split="val"), task) >= KEEP * before

    alpha = GRID[largest(lambda index: keeps(GRID[index]), len(GRID))]
    test, base = workshop.changed(change, -alpha), workshop.zero_shot()
    return {
        "alpha": alpha,
        "target": test[task],
        "control": _mean_without(test, task),
        "target_before": base[task],
        "control_before": _mean_without(base, task),
        "error": error,
    }


def largest(holds: Callable[[int], bool], count: int) -> int:
    """The last index that holds, by bisection; what is lost grows with alpha. The first one always holds."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def reconstruction(workshop: Workshop, kind: str, num_bases: int, index: int) -> tuple[Change, float]:
    """tau_hat of one task, and |tau_hat - tau|^2 / |tau|^2."""
    vectors, gram = workshop.vectors(), workshop.gram()
    if kind == "rand_proj":
        return projected(workshop, num_bases, index)
    column = mixing(kind, gram, num_bases, index)
    away = column - torch.eye(len(gram), dtype=torch.float64)[index]
    return lambda name: total(vectors.deltas(name), column.tolist()), float(away @ gram @ away / gram[index, index])


def mixing(kind: str, gram: Tensor, num_bases: int, index: int) -> Tensor:
    """[T] how tau_hat is a sum of task vectors. PCA stores its mean too: that is one of the M vectors."""
    made: dict[str, Callable[[], Tensor]] = {
        "true": lambda: torch.eye(len(gram), dtype=torch.float64),
        "ae_adam": lambda: ae_bases(gram, num_bases, solver="adam", balance=False).reconstruction,
        "balanced": lambda: ae_bases(gram, num_bases).reconstruction,
        "normalize": lambda: ae_bases(gram, num_bases, normalize=True).reconstruction,
        "pca": lambda: pca_bases(gram, num_bases - 1).reconstruction,
        "even": lambda: ae_bases(gram, num_bases, even_errors=True).reconstruction,
        "random_span": lambda: fitted("span", gram, random_span(len(gram), num_bases, index)).reconstruction,
    }
    return made[kind]()[:, index]


def projected(workshop: Workshop, num_bases: int, index: int) -> tuple[Change, float]:
    """Q Q^T tau for M random orthonormal directions of the whole space: almost nothing of tau is in them."""
    vectors, tensors = workshop.vectors(), workshop.vectors().base.tensors
    tau = {name: vectors.deltas(name)[index].block(0, tensors[name].numel).reshape(1, -1) for name in vectors.names}
    found = rand_proj(tau.items(), num_bases)
    norm = sum(float(part.to(torch.float64).square().sum()) for part in tau.values())
    return (
        lambda name: Dense(found.reconstruct(name, tensors[name].numel).float().reshape(tensors[name].shape)),
        1 - float(found.coefficients.square().sum()) / norm,
    )


def _mean_without(values: dict[str, float], task: str) -> float:
    others: Sequence[float] = [value for name, value in values.items() if name != task]
    return sum(others) / len(others)


STUDY = Study("negation", questions, answer, version=2)
