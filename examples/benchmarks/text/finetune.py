"""Study: the fine-tunes themselves, and what each is worth on its own task."""

from __future__ import annotations

from collections.abc import Iterator

from evidence.runner import Answer, Question, Study

from . import models
from .settings import Settings
from .workshop import Workshop


def questions(settings: Settings) -> Iterator[Question]:
    """Full fine-tunes with every seed, adapters with the first; nobody merges the tasks that are kept aside."""
    everything = (*settings.tasks, *settings.unseen) if settings.asks("ood") else settings.tasks
    for seed in settings.seeds:
        for task in everything if seed == settings.seeds[0] else settings.tasks:
            yield {"kind": "full", "seed": seed, "task": task}
    for kind in ("lora", "dora") if settings.asks("adapters") else ():
        for task in settings.tasks:
            yield {"kind": kind, "seed": settings.seeds[0], "task": task}


def answer(workshop: Workshop, question: Question) -> Answer:
    kind, seed, task = question["kind"], question["seed"], question["task"]
    problem = workshop.problems[task]
    base = workshop.accuracy(workshop.model, tasks=[task])[task]
    model = models.train(workshop.workdir, kind, seed, task, problem, workshop.settings.recipe)
    size = sum(f.stat().st_size for f in workshop.path(task, seed, kind).glob("*.safetensors"))
    return {"zero_shot": base, "own": workshop.accuracy(model, tasks=[task])[task], "bytes": size}


def holds(workshop: Workshop, question: Question) -> bool:
    return models.is_trained(workshop.path(question["task"], question["seed"], question["kind"]))


STUDY = Study("finetune", questions, answer, holds=holds)
