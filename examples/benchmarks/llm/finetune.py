"""Study: the base, and the fine-tunes themselves: what each is worth on its own task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evidence.runner import Answer, Question, Study

from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.models.vectors import Vectors

from . import behaviour, models
from .abilities import domain_text
from .settings import Settings
from .workshop import Workshop


def questions(settings: Settings) -> Iterator[Question]:
    """LoRAs with every seed, which also decides the first weights of all of its adapters."""
    first, *others = settings.seeds
    yield {"kind": "base", "seed": first, "task": "all"}
    for seed in (first, *others):
        yield from ({"kind": "lora", "seed": seed, "task": task} for task in settings.tasks)
    if settings.asks("kinds"):
        for kind in ("apart", "dora", "full"):
            tasks = settings.tasks[:3] if kind == "full" else settings.tasks
            yield from ({"kind": kind, "seed": first, "task": task} for task in tasks)
        yield from ({"kind": "text", "seed": first, "task": domain} for domain in settings.domains)
    if settings.asks("unlearning"):
        yield from ({"kind": behaviour.NAME, "seed": seed, "task": behaviour.NAME} for seed in behaviour.SEEDS)


def answer(workshop: Workshop, question: Question) -> Answer:
    if question["kind"] == "base":
        return workshop.tested(workshop.model, abilities=True)
    path = fine_tuned(workshop, question["kind"], question["seed"], question["task"])
    task = question["task"]
    vectors = Vectors.open(workshop.base, {task: path})
    with InPlace(workshop.model, vectors.names).changed(lambda name: vectors.deltas(name)[0]) as model:
        found = workshop.tested(model, [task]) if task in workshop.tasks else {"bits": workshop.bits(model)}
    return {**found, "bytes": sum(f.stat().st_size for f in path.glob("*.safetensors"))}


FORMS = {"apart": "lora", "text": "lora", behaviour.NAME: "dora"}


def fine_tuned(workshop: Workshop, kind: str, seed: int, task: str) -> Path:
    """The directory of a fine-tune, trained if it has not been.

    ``apart``: a LoRA with first weights of its own; ``text``: a LoRA that has read one of the domains; ``rude``: a DoRA
    that has learnt to answer rudely.
    """
    path, recipe = workshop.path(task, seed, kind), workshop.settings.recipe
    if not models.is_trained(path):
        start = 1000 + workshop.settings.tasks.index(task) if kind == "apart" else seed
        data = _data(workshop, kind, seed, task)
        models.train(path, workshop.base, FORMS.get(kind, kind), data, recipe, seed, start)
    return path


def _data(workshop: Workshop, kind: str, seed: int, task: str) -> TaskData:
    tokenizer, recipe = workshop.tokenizer, workshop.settings.recipe
    if kind == "text":
        return models.text_data(task, domain_text(task, "train"), tokenizer, recipe, seed)
    if kind == behaviour.NAME:
        return behaviour.reply_data(task, behaviour.RUDE, tokenizer, recipe, seed)
    return models.task_data(workshop.tasks[task], tokenizer, recipe, seed)


def holds(workshop: Workshop, question: Question) -> bool:
    kind, seed, task = question["kind"], question["seed"], question["task"]
    return kind == "base" or models.is_trained(workshop.path(task, seed, kind))


STUDY = Study("finetune", questions, answer, holds=holds)
