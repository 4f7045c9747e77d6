"""Study: a task that nobody has a vector for, learned by aTLAS from a few sentences per label (AE paper, Table 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from evidence.runner import Answer, Question, Study

from tvbases_hf.learning.atlas import atlas
from tvbases_hf.learning.data import TaskData

from . import models
from .kinds import ALL, vectors_of
from .settings import Settings
from .workshop import Workshop

KINDS = (ALL, "balanced", "ae_adam", "rand_select", "pca")
DRAWS = 3
EPOCHS = 10


def questions(settings: Settings) -> Iterator[Question]:
    for task in settings.unseen:
        for kind in KINDS:
            for draw in range(DRAWS if settings.everything else 1):
                yield {
                    "task": task,
                    "kind": kind,
                    "num_bases": len(settings.tasks) if kind == ALL else settings.half,
                    "shots": settings.shots,
                    "draw": draw,
                }


def answer(workshop: Workshop, question: Question) -> Answer:
    """Every draw sees other sentences, and another selection."""
    task, draw = question["task"], question["draw"]
    vectors = vectors_of(workshop, question["kind"], question["num_bases"], draw=draw)
    data = few(workshop, task, question["shots"], draw)
    found = atlas(vectors, workshop.model, [data], epochs=EPOCHS)
    test = workshop.changed(found.change, tasks=[task])[task]
    return {"accuracy": test, "zero_shot": workshop.accuracy(workshop.model, tasks=[task])[task]}


def few(workshop: Workshop, task: str, shots: int, draw: int) -> TaskData:
    """``shots`` training sentences of every label."""
    problem = workshop.problems[task]
    order = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(draw)).tolist()
    rows = [
        row
        for label in range(len(problem.head))
        for row in [i for i in order if int(problem.train.labels[i]) == label][:shots]
    ]
    mixed = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(draw)).tolist()]
    parts = [mixed[k : k + 16] for k in range(0, len(mixed), 16)]
    batches = [([problem.train.ids[i] for i in part], problem.train.labels[part]) for part in parts]
    return TaskData(task, batches, models.readout_of(problem))


STUDY = Study("ood", questions, answer)
