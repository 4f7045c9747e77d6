"""Study: the bounds of the AE paper's section 3.2.3, both sides, on these fine-tunes."""

from __future__ import annotations

from collections.abc import Iterator

from evidence.runner import Answer, Question, Study

from tvbases_demo.encoder import problem_data
from tvbases_hf.theory.bounds import measure_bounds
from tvbases_hf.theory.hessian import cross_entropy

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
    # Training sentences, whose gradient at the fine-tune the theorem takes for 0; in float32.
    count = question["sentences"]
    data = problem_data(task, workshop.problems[task], "train", count=count, batch=count)
    terms = {task: cross_entropy(data)}
    vectors = workshop.vectors()
    found = measure_bounds(
        workshop.model, vectors, terms, question["num_bases"], tolerance=0.02, max_iterations=ITERATIONS
    )
    return found.to_json()


STUDY = Study("bounds", questions, answer)
