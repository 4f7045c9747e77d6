"""Choose coefficients and forget a task, on real fine-tunes: alpha for all, alpha per basis, negation under a control.

    python examples/negate.py [--workdir DIR] [--forget TASK] [--sentences N] [--unique]

The models are the demo's (all-MiniLM-L6-v2 on eight small tasks): those of `make demo` are used again, missing ones are
trained in a few minutes. Nothing is written but these and the curves, `WORKDIR/curves/*.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tvbases_demo import Settings, encoder
from tvbases_demo.compare import examples_of
from tvbases_demo.encoder import Problem
from tvbases_demo.run import DEFAULT_WORKDIR, fine_tunes
from tvbases_hf import (
    Curve,
    Delta,
    InPlace,
    Negation,
    Options,
    Vectors,
    ae_bases,
    change_of,
    coordinate_search,
    decompose,
    gram_matrix,
    grid_search,
    negate,
    summed,
)

Change = Callable[[str], Any]
Metrics = Callable[[nn.Module], dict[str, float]]
NUM_BASES = 4
# A quarter of the width at most: above that, random subspaces of 384 dimensions look shared (see decompose).
DECOMPOSITION = Options(rank=0.25, pool="iterative")


def accuracies(problems: dict[str, Problem], split: str, sentences: int | None = None) -> Metrics:
    """Share of correct answers by task, on the first sentences of a split; all are embedded together."""
    examples = {name: examples_of(problem, split) for name, problem in problems.items()}
    tasks = [(p.head, examples[n].first(sentences or len(examples[n]))) for n, p in problems.items()]

    def metrics(model: nn.Module) -> dict[str, float]:
        found = encoder.accuracies(model, tasks)
        return {name: value / 100 for name, value in zip(problems, found, strict=True)}

    return metrics


def unique_component(vectors: Vectors, task: str) -> Callable[[str], Delta]:
    """What a task vector shares with none of the others."""
    index = vectors.labels.index(task)
    return lambda name: decompose(vectors.deltas(name), DECOMPOSITION, targets=[index]).unique[index]


def search(place: InPlace, vectors: Vectors, validation: Metrics, test: Metrics, curves: Path, say: Console) -> None:
    """One alpha for all task vectors, one for all bases, and one for each basis."""
    everything = vectors
    bases = vectors.mixed(ae_bases(gram_matrix(vectors).matrix, NUM_BASES))
    own = {}
    for task in vectors.tasks:
        with place.changed(change_of(everything, task)) as model:
            own[task] = validation(model)[task]
    table = Table("vectors", "alpha", "validation", "models tried", "test", title="accuracy, mean of the tasks")

    def row(title: str, alphas: str, score: float, tried: int, change: Change, alpha: float) -> None:
        with place.changed(change, alpha) as model:
            reached = test(model)
        mean = sum(reached.values()) / len(reached)
        table.add_row(title, alphas, f"{score:.1%} of own", str(tried), f"{mean:.1%}")

    common: dict[str, Curve] = {}
    for title, chosen in (("8 task vectors", everything), (f"{NUM_BASES} bases", bases)):
        change = functools.cache(summed(chosen))  # 90 MB for this model
        curve = common[title] = grid_search(place, change, validation, own=own)
        curve.save(curves / f"{title.replace(' ', '_')}.json")
        row(title, f"{curve.chosen:g}", curve.best, len(curve.alphas), change, curve.chosen)
    found = coordinate_search(place, bases, validation, common[f"{NUM_BASES} bases"].chosen, own=own)
    numbers = ", ".join(f"{alpha:g}" for alpha in found.alphas)
    row(f"{NUM_BASES} bases, one by one", numbers, found.score, found.evaluations, summed(bases, found.alphas), 1.0)
    say.print(table)
    weights = ", ".join(f"{task} {weight:.2f}" for task, weight in found.weights.items())
    say.print(f"weights of the tasks then: {weights}\n")


def forget(
    place: InPlace,
    vectors: Vectors,
    task: str,
    validation: Metrics,
    test: Metrics,
    curves: Path,
    say: Console,
    unique: bool = False,
) -> None:
    """Take a task away as it is, as the bases hold it, and what is unique to it, as far as the other tasks allow."""
    everything = vectors
    rebuilt = vectors.mixed(ae_bases(gram_matrix(vectors).matrix, NUM_BASES), "reconstructions")
    changes = {
        "task vector": change_of(everything, task),
        f"rebuilt from {NUM_BASES} bases": change_of(rebuilt, task),
    }
    if unique:
        changes["unique component"] = unique_component(everything, task)
    title = f'forgetting "{task}": accuracy before -> after, on test sentences'
    table = Table("what is taken away", "alpha", task, "other tasks", title=title)
    with place.changed(changes["task vector"], 0.0) as model:
        before = test(model)
    for name, change in changes.items():
        kept = functools.cache(change)
        found: Negation = negate(place, kept, validation, task)
        file = curves / f"forget_{task}_{name.replace(' ', '_')}.json"
        file.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
        with place.changed(kept, -found.alpha) as model:
            after = test(model)
        others = [sum(m[t] for t in found.controls) / len(found.controls) for m in (before, after)]
        table.add_row(
            name, f"{found.alpha:g}", f"{before[task]:.1%} -> {after[task]:.1%}", "{:.1%} -> {:.1%}".format(*others)
        )
        say.print(f"{name}, on validation sentences: {found.summary()}")
    say.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workdir", type=Path, default=DEFAULT_WORKDIR)
    parser.add_argument("--forget", default="negation")
    parser.add_argument("--sentences", type=int, default=40, help="per task, for validation")
    parser.add_argument("--unique", action="store_true", help="also its unique component, which takes minutes")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    workdir, say = given.workdir.expanduser().absolute(), Console(quiet=given.quiet, highlight=False, soft_wrap=True)
    curves = workdir / "curves"
    curves.mkdir(parents=True, exist_ok=True)
    problems, models, _ = fine_tunes(workdir, Settings(), say)
    vectors = Vectors.open(workdir / "base", models)
    with torch.no_grad():
        place = InPlace(encoder.load(workdir / "base")[0], vectors.names)
    validation, test = accuracies(problems, "val", given.sentences), accuracies(problems, "test")
    search(place, vectors, validation, test, curves, say)
    forget(place, vectors, given.forget, validation, test, curves, say, given.unique)


if __name__ == "__main__":
    main()
