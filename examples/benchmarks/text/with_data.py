"""Study: the other merging methods of the papers over all vectors, balanced bases and a random selection.

Over M vectors a method sees n M / T of the n validation sentences of each task, stratified (AE paper, section 3.2.2).
Those that learn coefficients take fewer and longer steps than published, to fit a processor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from tvbases_hf.merging import DATA_METHODS, METHODS, merged
from tvbases_hf.merging.learned import held
from tvbases_hf.merging.localize import Stitched
from tvbases_hf.vectors import Vectors

from .kinds import ALL, bytes_of, vectors_of
from .runner import Answer, Question, Study
from .settings import START, Settings
from .workshop import Tuned, Workshop

TITLES = {
    "magmax": "MagMax",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "localize": "Localize-and-Stitch",
    "adamerging": "AdaMerging",
    "atlas": "aTLAS",
}
KINDS = (ALL, "balanced", "rand_select")
OPTIONS: dict[str, dict[str, Any]] = {
    "localize": {"epochs": 3},
    "adamerging": {"lr": 1e-2, "steps": 25},
    "atlas": {"epochs": 3},
}
WITH_RANDOM = ("localize", "regmean")
"""Whose paper, or whose statistics, a random selection is compared for."""
SENTENCES = 64
"""Per task, for the methods that take gradients or statistics, at M = T."""
SCALED = ("magmax", "fisher", "regmean", "localize")
"""Their alpha is chosen on validation sentences, as that of task arithmetic; the others learn a length."""


def questions(settings: Settings) -> Iterator[Question]:
    for method in TITLES:
        for kind in KINDS if method in WITH_RANDOM else KINDS[:2]:
            yield {"method": method, "kind": kind, "num_bases": len(settings.tasks) if kind == ALL else settings.half}


def answer(workshop: Workshop, question: Question) -> Answer:
    method, kind = question["method"], question["kind"]
    vectors = vectors_of(workshop, kind, question["num_bases"])
    size = bytes_of(vectors, len(vectors))
    if method in METHODS:
        change = merged(vectors, method)
    else:
        vectors = held(vectors) if kind != ALL else vectors
        found = DATA_METHODS[method](vectors, workshop.model, data_of(workshop, vectors), **options_of(method, vectors))
        change = functools.cache(found.change)
        size = found.vectors.nbytes if isinstance(found, Stitched) else size
    if method in SCALED:
        tuned = workshop.tuned(change, 1.0)
    else:
        test = workshop.changed(change)
        tuned = Tuned(1.0, {}, test)
    return {"accuracy": tuned.mean, "tasks": tuned.test, "alpha": tuned.alpha, "bytes": size}


def data_of(workshop: Workshop, vectors: Vectors):
    """Validation sentences of the tasks that have a share in the vectors."""
    count = min(SENTENCES, workshop.settings.validation) * len(vectors) // len(vectors.tasks)
    shares = vectors.encoder.abs().sum(dim=1).tolist()
    tasks = [task for task, share in zip(vectors.tasks, shares, strict=True) if share > 0]
    return workshop.data(tasks, count=max(1, count))


def options_of(method: str, vectors: Vectors) -> dict[str, Any]:
    options = dict(OPTIONS.get(method, {}))
    if method == "adamerging":  # K vectors begin with the weight of T
        options["start"] = START * len(vectors.tasks) / len(vectors)
    return options


STUDY = Study("with_data", questions, answer)
