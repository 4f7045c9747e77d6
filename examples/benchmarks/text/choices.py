"""Studies of the bases' own choices: how many (M), the paper's temperature, how much validation data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from evidence.runner import Answer, Question, Study

from tvbases_demo import encoder
from tvbases_hf.bases import ae_bases
from tvbases_hf.learning.coefficients import climb
from tvbases_hf.learning.data import stratified
from tvbases_hf.merging.apply import merged

from . import addition
from .kinds import KINDS, vectors_of, weights_of
from .models import half_precision
from .settings import ALPHAS, Settings
from .workshop import Workshop, start_of

TEMPERATURES = (0.5, 1.0, 2.0, 5.0, 10.0)
COUNTS = (5, 10, 25, 50, 100, 200)
REDRAWS = 20


def sizes(settings: Settings) -> Iterator[Question]:
    """Task arithmetic over M vectors, where the study of addition has not asked already."""
    others = {m for m in (1, 3, 6) if m < len(settings.tasks)} - set(settings.num_bases)
    for num_bases in sorted(others):  # balanced bases have the sum of all vectors, whatever M is
        for kind in ("ae_adam", "pca"):
            yield {"kind": kind, "num_bases": num_bases, "draw": 0}
        for draw in range(min(settings.draws, 2)):
            yield {"kind": "rand_select", "num_bases": num_bases, "draw": draw}


def accuracy_at_size(workshop: Workshop, question: Question) -> Answer:
    asked = {"method": "task_arithmetic", "over": "bases", "seed": workshop.settings.seeds[0], **question}
    return addition.answer(workshop, asked)


def temperatures(settings: Settings) -> Iterator[Question]:
    return ({"temperature": value} for value in TEMPERATURES)


def accuracy_at_temperature(workshop: Workshop, question: Question) -> Answer:
    """The paper's recipe; varpro's optimum does not depend on the temperature."""
    gram, m = workshop.gram(), workshop.settings.half
    found = ae_bases(gram, m, solver="adam", balance=False, temperature=question["temperature"])
    vectors = workshop.vectors().mixed(found)
    tuned = workshop.tuned(merged(vectors, "task_arithmetic"), start_of(m, len(vectors.tasks)))
    effective = found.effective_weights
    return {
        "accuracy": tuned.mean,
        "alpha": tuned.alpha,
        "loss": found.loss / found.total,
        "bound": found.spectral_bound / found.total,
        "effective": [float(effective.min()), float(effective.max())],
    }


def subsamples(settings: Settings) -> Iterator[Question]:
    return ({"kind": kind} for kind in ("ae_adam",))


def accuracy_of_subsamples(workshop: Workshop, question: Question) -> Answer:
    """Test accuracy when alpha is chosen on ``count`` validation sentences per task: mean and spread over redraws.

    Every alpha of the grid is evaluated once on all sentences; subsets only count which answers were right.
    """
    m = workshop.settings.half
    change = merged(vectors_of(workshop, question["kind"], m), "task_arithmetic")
    grid = [alpha for alpha in ALPHAS if 0.2 <= alpha <= 2.5]
    right, test = [], []
    for alpha in grid:
        with workshop.place().changed(change, alpha) as model:
            right.append({task: data_right(workshop, model, task) for task in workshop.settings.tasks})
            test.append(sum(workshop.accuracy(model).values()) / len(workshop.settings.tasks))
    start = min(range(len(grid)), key=lambda i: abs(grid[i] - start_of(m, len(workshop.settings.tasks))))
    found = {}
    for count in (c for c in COUNTS if c <= workshop.settings.validation):
        chosen = [test[_best(workshop, right, count, redraw, start)] for redraw in range(REDRAWS)]
        values = torch.tensor(chosen, dtype=torch.float64)
        found[str(count)] = [values.mean().item(), values.std().item()]
    return {"by_count": found, "best": max(test)}


def data_right(workshop: Workshop, model: torch.nn.Module, task: str) -> list[bool]:
    """Which validation sentences of a task are answered rightly."""
    problem = workshop.problems[task]
    with half_precision():
        embeddings = encoder.embed(model, problem.val.ids)
    return (encoder.logits(embeddings, problem.head).argmax(1) == problem.val.labels).tolist()


def _best(workshop: Workshop, right: list[dict[str, list[bool]]], count: int, redraw: int, start: int) -> int:
    """Index of the alpha that a stratified subset prefers."""
    rows = {task: stratified(workshop.problems[task].val.labels.tolist(), count, seed=redraw) for task in right[0]}
    score = [sum(sum(found[task][i] for i in rows[task]) for task in rows) for found in right]
    return climb(lambda i: float(score[i]), len(score), start)


def losses(settings: Settings) -> Iterator[Question]:
    """Relative reconstruction loss of every kind: linear algebra alone."""
    return ({"kind": kind, "num_bases": m} for m in range(1, len(settings.tasks)) for kind in KINDS)


def loss(workshop: Workshop, question: Question) -> Answer:
    found = weights_of(workshop, question["kind"], question["num_bases"])
    effective = found.effective_weights
    return {
        "loss": found.loss / found.total,
        "bound": found.spectral_bound / found.total,
        "effective": [float(effective.min()), float(effective.max())],
        "condition": found.condition,
    }


SIZES = Study("sizes", sizes, accuracy_at_size)
TEMPERATURE = Study("temperature", temperatures, accuracy_at_temperature)
SUBSAMPLES = Study("subsamples", subsamples, accuracy_of_subsamples)
LOSSES = Study("losses", losses, loss)
