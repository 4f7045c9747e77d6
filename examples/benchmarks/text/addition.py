"""Study: one model for all tasks. Methods x kinds of vectors, over the bases and over the reconstructions.

The alpha of every cell is chosen on validation sentences of all tasks; the accuracy is that on test sentences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from evidence.runner import Answer, Question, Study

from tvbases_hf.merging.apply import merged
from tvbases_hf.models.vectors import Vectors

from .kinds import ALL, KINDS, SIDES, bytes_of, kept, vectors_of, weights_of
from .settings import Settings
from .workshop import Workshop, start_of

METHODS = {"task_arithmetic": "task arithmetic", "ties": "TIES", "tsv": "TSV-M"}
MAIN = ("balanced", "ae_adam", "pca")
BALANCED = ("balanced", "normalize", "even")
FEW = 2
"""Random selections per fine-tuning seed for the methods beside task arithmetic, unless everything is asked."""


def questions(settings: Settings) -> Iterator[Question]:
    """The main kinds with every fine-tuning seed; with the first also every kind and the reconstructions, if asked."""
    asked = [*_main(settings), *(_product(settings) if settings.everything else _merged_reconstructions(settings))]
    yield from {tuple(question.values()): question for question in asked}.values()


def _main(settings: Settings) -> Iterator[Question]:
    for seed in settings.seeds:
        for method in METHODS:
            yield _ask(method, ALL, len(settings.tasks), seed)
        for num_bases in settings.num_bases:
            for method in METHODS:
                yield from (_ask(method, kind, num_bases, seed) for kind in MAIN)
                draws = _draws(settings, seed)
                asked = draws if method == "task_arithmetic" or settings.everything else draws[:FEW]
                yield from (_ask(method, "rand_select", num_bases, seed, draw=draw) for draw in asked)


def _merged_reconstructions(settings: Settings) -> Iterator[Question]:
    for num_bases in settings.num_bases:
        yield _ask("tsv", "balanced", num_bases, settings.seeds[0], "reconstructions")


def _product(settings: Settings) -> Iterator[Question]:
    for over, num_bases, kind, method in itertools.product(SIDES, settings.num_bases, KINDS, METHODS):
        if not known_exactly(method, kind, over):
            yield _ask(method, kind, num_bases, settings.seeds[0], over)


def known_exactly(method: str, kind: str, over: str) -> bool:
    """The reconstructions of balanced bases have the sum of all task vectors."""
    return (method, over) == ("task_arithmetic", "reconstructions") and kind in BALANCED


def _draws(settings: Settings, seed: int) -> range:
    """Subsets are numbered on from seed to seed, so that all are different."""
    begin = settings.seeds.index(seed) * settings.draws
    return range(begin, begin + settings.draws)


def _ask(method: str, kind: str, num_bases: int, seed: int, over: str = "bases", draw: int = 0) -> Question:
    return {"method": method, "kind": kind, "num_bases": num_bases, "over": over, "seed": seed, "draw": draw}


def answer(workshop: Workshop, question: Question) -> Answer:
    method, kind, num_bases, over, seed = (question[key] for key in ("method", "kind", "num_bases", "over", "seed"))
    vectors = vectors_of(workshop, kind, num_bases, over=over, seed=seed, draw=question["draw"])
    tuned = workshop.tuned(merged(vectors, method), first_guess(method, kind, vectors), seed=seed)
    weights = None if kind == ALL else weights_of(workshop, kind, num_bases, seed, question["draw"])
    return {
        "accuracy": tuned.mean,
        "tasks": tuned.test,
        "alpha": tuned.alpha,
        "curve": tuned.curve,
        "bytes": bytes_of(vectors, kept(kind, num_bases, over)),
        "loss": weights and weights.loss / weights.total,
        "effective": weights and weights.effective_weights.tolist(),
    }


def first_guess(method: str, kind: str, vectors: Vectors) -> float:
    """Where the search for alpha begins: it ends at the same alpha from elsewhere, but later."""
    if kind == "rand_select":  # as long as task vectors are, and of few tasks
        return 0.6 if method == "task_arithmetic" else 1.25
    if method == "task_arithmetic":
        return start_of(len(vectors), len(vectors.tasks))
    return 1.25 if kind == ALL else 2.5


STUDY = Study("addition", questions, answer)
