"""Study: one model for all tasks. Methods over all vectors, over bases and over reconstructions.

The alpha of a cell is chosen on validation prompts of all tasks, or given; accuracies are of test prompts. Beside them:
how many simple instructions the merge still follows, and bits per byte of four text domains.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

from evidence.runner import Answer, Question, Study

from .merges import ALL, METHODS, opened
from .settings import Settings
from .workshop import Workshop

FIRST = ("task_arithmetic", "tsv", "iso_c", "ties")
"""Asked of every seed; the others of the first."""


def questions(settings: Settings) -> Iterator[Question]:
    """In order of importance, so that a run that is stopped has the main ones."""
    first, *others = settings.seeds
    half, quarter = settings.num_bases
    yield from _main(first, half, quarter)
    if settings.asks("methods"):
        for method in METHODS:
            if method not in FIRST:
                yield ask(method, seed=first)
        for kind in ("paper", "rand_select", "pca"):
            yield ask("task_arithmetic", kind, half, seed=first)
        for kind in ("paper", "rand_select"):
            yield ask("tsv", kind, half, seed=first)
        yield ask("tsv", "balanced", half, "reconstructions", seed=first)
        yield ask("iso_c", "balanced", half, "reconstructions", seed=first)
    for seed in others:
        yield from _main(seed, half, quarter)
    if settings.asks("kinds"):
        yield from _kinds(settings)


def _kinds(settings: Settings) -> Iterator[Question]:
    """The same of other fine-tunes: first weights of their own, DoRA, and (of three tasks) full ones."""
    for adapters in ("apart", "dora", "full"):
        more = {"adapters": adapters} | ({"count": 3} if adapters == "full" else {})
        for method in FIRST[:3]:
            yield {**ask(method, seed=settings.seeds[0]), **more}


def _main(seed: int, half: int, quarter: int) -> Iterator[Question]:
    yield ask("task_arithmetic", seed=seed)
    yield ask("tsv", seed=seed, alpha=1.0)
    yield ask("iso_c", seed=seed)
    yield ask("iso_c", "balanced", quarter, seed=seed)
    yield ask("tsv", seed=seed)
    yield ask("task_arithmetic", "balanced", quarter, seed=seed)
    yield ask("tsv", "balanced", quarter, seed=seed)
    yield ask("tsv", "balanced", half, seed=seed)
    yield ask("ties", seed=seed)
    yield ask("task_arithmetic", seed=seed, alpha=1.0)


def ask(
    method: str, kind: str = ALL, num_bases: int | None = None, over: str = "bases", *, seed: int, **more: float
) -> Question:
    return {"method": method, "kind": kind, "num_bases": num_bases, "over": over, "seed": seed, **more}


def answer(workshop: Workshop, question: Question) -> Answer:
    merge = opened(workshop, question)
    change, began = functools.cache(merge.change), time.perf_counter()
    for name in merge.names:
        change(name)
    merging = time.perf_counter() - began
    start = METHODS[question["method"]].start
    chosen = workshop.settings.tasks[: question.get("count")]
    asked = {"start": start, "alpha": question.get("alpha"), "chosen": chosen, "abilities": True}
    worth = workshop.worth(merge.names, change, **asked)
    return worth | {"merging_seconds": merging}


STUDY = Study("addition", questions, answer)
