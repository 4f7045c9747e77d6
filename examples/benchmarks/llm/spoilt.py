"""Study: one adapter of a merge is bad. What do the other tasks lose, by method?

The first task's adapter has learnt shuffled labels, or was trained over another base: the same model that has read one
of the text domains with all of its weights. ``tvbases merge`` refuses the second while the adapter names that base.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from evidence.runner import Answer, Question, Study

from tvbases_hf.algebra.products import square_norm
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.output import write_json

from . import addition, models
from .abilities import domain_text
from .causes import MERGES
from .merges import opened
from .prompts import Prompts
from .settings import Settings
from .workshop import Workshop, mean

SOUND, SHUFFLED, ELSEWHERE = "lora", "shuffled", "elsewhere"
TITLES = {SOUND: "no adapter", SHUFFLED: "shuffled labels", ELSEWHERE: "another base"}
READ = "read"
LR = 1e-4
"""At which the other base has read: five times that of a full fine-tune, so that it is another."""


def questions(settings: Settings) -> Iterator[Question]:
    for seed in settings.seeds:
        for method in MERGES:
            yield from ({**addition.ask(method, seed=seed), "first": kind} for kind in TITLES)


def answer(workshop: Workshop, question: Question) -> Answer:
    """Accuracy on the other tasks, and on the first one; how far the other base is from the base, relatively."""
    first, *others = workshop.settings.tasks
    trained(workshop, question["first"], question["seed"], first)
    merge = opened(workshop, question)
    found = workshop.worth(merge.names, functools.cache(merge.change), alpha=MERGES[question["method"]])
    told = {"tasks": found["tasks"], "first": found["tasks"][first]}
    if question["first"] == ELSEWHERE:
        told["moved"] = moved(workshop)
    return {"accuracy": mean({task: found["tasks"][task] for task in others}), **told}


def trained(workshop: Workshop, kind: str, seed: int, task: str) -> Path:
    """The adapter of the first task, trained if it has not been."""
    path, recipe = workshop.path(task, seed, kind), workshop.settings.recipe
    if kind != SOUND and not models.is_trained(path):
        base = workshop.base if kind == SHUFFLED else other_base(workshop)
        prompts = workshop.tasks[task] if kind == ELSEWHERE else shuffled(workshop.tasks[task], seed)
        data = models.task_data(prompts, workshop.tokenizer, recipe, seed)
        models.train(path, base, "lora", data, recipe, seed, seed)
    if kind == ELSEWHERE:
        rename_base(path, workshop.base)
    return path


def rename_base(path: Path, base: Path) -> None:
    """Have the adapter name another base than its own: while it names its own, the merge is refused."""
    file = path / "adapter_config.json"
    write_json(file, json.loads(file.read_text("utf-8")) | {"base_model_name_or_path": str(base)})


def shuffled(prompts: Prompts, seed: int) -> Prompts:
    """The same training prompts, with each other's labels."""
    texts, labels = zip(*prompts.splits["train"], strict=True)
    mixed = random.Random(seed).sample(labels, len(labels))
    return replace(prompts, splits={**prompts.splits, "train": list(zip(texts, mixed, strict=True))})


def other_base(workshop: Workshop) -> Path:
    domain = workshop.settings.domains[-1]
    path, recipe = workshop.path(domain, 0, READ), replace(workshop.settings.recipe, full_lr=LR)
    if not models.is_trained(path):
        data = models.text_data(domain, domain_text(domain, "train"), workshop.tokenizer, recipe, 0)
        models.train(path, workshop.base, "full", data, recipe, 0, 0)
    return path


def moved(workshop: Workshop) -> float:
    """The norm of all that the other base has changed, relative to the base's."""
    vectors = Vectors.open(workshop.base, {READ: other_base(workshop)})
    weights = workshop.model.state_dict()
    changed = sum(square_norm(vectors.deltas(name)[0]) for name in vectors.names)
    whole = sum(float(weights[name].double().square().sum()) for name in vectors.names)
    return (changed / whole) ** 0.5


STUDY = Study("spoilt", questions, answer)
