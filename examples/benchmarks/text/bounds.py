"""Study: the bounds of the AE paper's section 3.2.3, both sides, on these fine-tunes."""

from __future__ import annotations

from collections.abc import Iterator

from tvbases_hf.evaluation.data import TaskData, stratified
from tvbases_hf.theory.bounds import measure_bounds
from tvbases_hf.theory.hessian import cross_entropy

from . import models
from .runner import Answer, Question, Study
from .settings import Settings
from .workshop import Workshop

TASKS = ("cr", "trec")
SENTENCES = 24
ITERATIONS = 12
"""Of the power iteration: its estimate of L comes from below, so a bound that holds with it holds."""


def questions(settings: Settings) -> Iterator[Question]:
    asked = [task for task in TASKS if task in settings.tasks] or list(settings.tasks[:2])
    return ({"task": task, "num_bases": settings.half, "sentences": SENTENCES} for task in asked)


def answer(workshop: Workshop, question: Question) -> Answer:
    task = question["task"]
    terms = {task: cross_entropy(exact_data(workshop, task, question["sentences"]))}
    vectors = workshop.vectors()
    found = measure_bounds(
        workshop.model, vectors, terms, question["num_bases"], tolerance=0.02, max_iterations=ITERATIONS
    )
    return found.to_json()


def exact_data(workshop: Workshop, task: str, count: int) -> TaskData:
    """Training sentences, whose gradient at the fine-tune the theorem takes for 0, in float32."""
    problem = workshop.problems[task]
    rows = stratified(problem.train.labels.tolist(), count)
    batch = ([problem.train.ids[i] for i in rows], problem.train.labels[rows])
    return TaskData(task, [batch], models.readout_of(problem, exact=True))


STUDY = Study("bounds", questions, answer)
