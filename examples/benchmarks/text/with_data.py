"""Study: the other merging methods of the papers, over all vectors, over bases and over their reconstructions.

Over M vectors a method sees n M / T of the n validation sentences of each task, stratified (AE paper, section 3.2.2).
Those that learn coefficients take fewer and longer steps than published, and Fisher draws one label a sentence, to fit
a processor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from evidence.runner import Answer, Question, Study

from tvbases_hf.learning.learned import held
from tvbases_hf.learning.localize import Stitched
from tvbases_hf.learning.with_data import DATA_METHODS
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.models.vectors import Vectors

from .kinds import ALL, KINDS, bytes_of, kept, vectors_of
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
# Even errors are for what is done to one task; all of these look at many.
ASKED = tuple(kind for kind in KINDS if kind != "even")
OPTIONS: dict[str, dict[str, Any]] = {
    "fisher": {"samples": 1},
    "localize": {"epochs": 3},
    "adamerging": {"lr": 1e-2, "steps": 25},
    "atlas": {"epochs": 3},
}
SENTENCES = 64
"""Per task, for the methods that take gradients or statistics, at M = T."""
SCALED = ("magmax", "fisher", "regmean", "localize")
"""Their alpha is chosen on validation sentences, as that of task arithmetic; the others learn a length."""


def questions(settings: Settings) -> Iterator[Question]:
    """With the first fine-tuning seed; of the reconstructions those at M = 50 % alone."""
    cells = [(ALL, len(settings.tasks), "bases")]
    cells += [(kind, m, "bases") for m in settings.num_bases for kind in ASKED]
    cells += [(kind, settings.half, "reconstructions") for kind in ASKED]
    for (kind, num_bases, over), method in itertools.product(cells, TITLES):
        yield {"method": method, "kind": kind, "num_bases": num_bases, "over": over}


def answer(workshop: Workshop, question: Question) -> Answer:
    method, kind, num_bases, over = (question[key] for key in ("method", "kind", "num_bases", "over"))
    vectors = vectors_of(workshop, kind, num_bases, over=over)
    size = bytes_of(vectors, kept(kind, num_bases, over))
    if method in METHODS:
        change = merged(vectors, method)
    else:
        vectors = held(vectors) if kind != ALL else vectors
        found = DATA_METHODS[method](vectors, workshop.model, data_of(workshop, vectors), **options_of(method, vectors))
        change = functools.cache(found.change)
        size = found.vectors.nbytes if isinstance(found, Stitched) else size
    if method in SCALED:
        tuned = workshop.tuned(change, first_guess(kind, vectors))
    else:
        test = workshop.changed(change)
        tuned = Tuned(1.0, {}, test)
    return {"accuracy": tuned.mean, "tasks": tuned.test, "alpha": tuned.alpha, "bytes": size}


def first_guess(kind: str, vectors: Vectors) -> float:
    """Where the search for alpha begins: convex bases are shorter than task vectors by T / M."""
    return 1.25 if kind == "rand_select" else 1.25 * len(vectors.tasks) / len(vectors)


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


STUDY = Study("with_data", questions, answer, version=2)
