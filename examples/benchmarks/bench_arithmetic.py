"""Merging methods x kinds of vectors on real fine-tunes: normalised accuracy, time, bytes kept.

    python examples/benchmarks/bench_arithmetic.py [--quick] [--methods NAME ...] [--json FILE]

The fine-tunes are those of `tvbases demo` (all-MiniLM-L6-v2, eight tasks, about a minute to train, cached). Columns:
all T task vectors, and M = 4 balanced autoencoder bases, principal components, and randomly selected task vectors. Over
M vectors the methods see n M / T of the n validation sentences of each task, stratified (AE paper, section 3.2.2).

Normalised accuracy is the mean over the tasks of accuracy(merged) / accuracy(its own fine-tune), on test sentences. The
methods without data have one alpha, chosen on those validation sentences; the others are as published, except that the
learned coefficients take fewer and longer steps, to fit a processor, and AdaMerging starts at 0.3 T / K, where K bases
weigh as much as T vectors. Statistics of task i are measured at what the vectors kept have of it. Time is that of the
method with its choice of alpha, on the clock and of the processor (the machine may be busy); bytes are what has to be
stored to merge again: K float32 vectors, or sparse ones.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from tvbases_demo import encoder
from tvbases_demo.compare import evaluate
from tvbases_demo.encoder import Examples, Problem
from tvbases_demo.run import DEFAULT_WORKDIR, Settings, fine_tunes
from tvbases_hf import Vectors, ae_bases, gram_matrix
from tvbases_hf.bases import pca_bases, rand_select
from tvbases_hf.learning.coefficients import grid_search
from tvbases_hf.learning.data import TaskData, stratified
from tvbases_hf.learning.inplace import Change, InPlace
from tvbases_hf.learning.learned import held
from tvbases_hf.learning.localize import Stitched
from tvbases_hf.learning.with_data import DATA_METHODS
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.storage.output import write_json
from tvbases_hf.storage.system import readable_size

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0)
START = 0.3  # effective weight per task where the search for alpha, and AdaMerging, start
SHORT = ("mean", "top_k", "ties", "magmax")  # as long as one vector, not as K
UNSCALED = ("fisher", "fisher_empirical", "regmean", "localize")
SETTINGS = Settings()
# What differs from the defaults, which are the authors'.
OPTIONS: dict[str, dict[str, Any]] = {
    "localize": {"epochs": 5},
    "adamerging": {"lr": 1e-2, "steps": 30},
    "adamerging_task": {"lr": 1e-2, "steps": 30},
    "atlas": {"epochs": 15},
    "atlas_nonnegative": {"epochs": 15},
}
QUICK = ("task_arithmetic", "regmean", "adamerging", "atlas", "fisher", "localize")
QUICK_OPTIONS: dict[str, dict[str, Any]] = {
    "localize": {"epochs": 3},
    "adamerging": {"lr": 2e-2, "steps": 12},
    "adamerging_task": {"lr": 2e-2, "steps": 12},
    "atlas": {"epochs": 12},
    "atlas_nonnegative": {"epochs": 12},
}


Clock = tuple[float, float]


def clock() -> Clock:
    return time.perf_counter(), time.process_time()


@dataclass(frozen=True)
class Cell:
    """Normalised accuracy by task and its mean, with which alpha, after how long, from how many bytes."""

    row: str
    accuracy: list[float]
    mean: float
    alpha: float
    seconds: float
    processor: float
    bytes: int


@dataclass(frozen=True)
class Bench:
    """The base in memory, its tasks, and the accuracy of every fine-tune on its own task."""

    model: nn.Module
    problems: dict[str, Problem]
    vectors: Vectors
    own: dict[str, float]
    validation: int
    test: int

    @classmethod
    def prepare(cls, workdir: Path, settings: Settings, validation: int, test: int) -> Bench:
        problems, models, _ = fine_tunes(workdir, settings, Console(quiet=True))
        own = {
            task: evaluate(encoder.load(path)[0], {task: problems[task]}, "test", test)[0] / 100
            for task, path in models.items()
        }
        vectors = Vectors.open(workdir / "base", models)
        return cls(encoder.load(workdir / "base")[0], problems, vectors, own, validation, test)

    def cell(
        self,
        row: str,
        place: InPlace,
        change: Change,
        alpha: float,
        began: Clock,
        vectors: Vectors,
        size: int | None = None,
    ) -> Cell:
        """What the merged model is worth on test sentences; the clock stops before it is asked."""
        seconds, busy = time.perf_counter() - began[0], time.process_time() - began[1]
        with place.changed(change, alpha) as model:
            found = evaluate(model, self.problems, "test", self.test)
        accuracy = [value / 100 / own for value, own in zip(found, self.own.values(), strict=True)]
        stored = len(vectors) * 4 * sum(vectors.base.tensors[name].numel for name in vectors.names)
        return Cell(
            row, accuracy, sum(accuracy) / len(accuracy), alpha, seconds, busy, stored if size is None else size
        )


def kinds_of(vectors: Vectors, kept: int, seed: int) -> dict[str, Vectors]:
    """The columns. A principal component has no share of a task: its data is that of all of them (AE paper, 4.1.1)."""
    gram = gram_matrix(vectors).matrix
    pca = vectors.mixed(pca_bases(gram, kept))
    return {
        "all vectors": vectors,
        "AE": held(vectors.mixed(ae_bases(gram, kept))),
        "PCA": held(replace(pca, encoder=torch.full_like(pca.encoder, 1 / len(vectors)))),
        "RandSelect": held(vectors.mixed(rand_select(gram, kept, seed=seed))),
    }


def subsampled(problem: Problem, count: int) -> Problem:
    """With ``count`` validation sentences, in which every label has its share."""
    rows = stratified(problem.val.labels.tolist(), min(count, len(problem.val)))
    return replace(problem, val=Examples([problem.val.ids[i] for i in rows], problem.val.labels[rows]))


def data_of(vectors: Vectors, problems: Mapping[str, Problem]) -> list[TaskData]:
    """The validation sentences of the tasks that have a share in the vectors."""
    shares = vectors.encoder.abs().sum(dim=1).tolist()
    return [
        encoder.problem_data(task, problem)
        for (task, problem), share in zip(problems.items(), shares, strict=True)
        if share > 0
    ]


def first_guess(name: str, vectors: Vectors) -> float:
    """A sum weighs as much as its K vectors, a mean as one."""
    return min(START * len(vectors.tasks) / (1 if name in (*SHORT, *UNSCALED) else len(vectors)), 2.0)


def search(place: InPlace, change: Change, problems: Mapping[str, Problem], start: float) -> float:
    """The alpha of the best mean accuracy on validation sentences."""

    def metrics(model: nn.Module) -> dict[str, float]:
        return dict(zip(problems, evaluate(model, problems, "val"), strict=True))

    return grid_search(place, change, metrics, alphas=ALPHAS, start=start, patience=2).chosen


def without_data(name: str, vectors: Vectors, bench: Bench, problems: Mapping[str, Problem]) -> list[Cell]:
    place, began = InPlace(bench.model, vectors.names), clock()
    change = functools.cache(merged(vectors, name))
    alpha = search(place, change, problems, first_guess(name, vectors))
    return [bench.cell(name, place, change, alpha, began, vectors)]


def with_data(name: str, vectors: Vectors, bench: Bench, problems: Mapping[str, Problem]) -> list[Cell]:
    """As published, and, where the method does not learn a length itself, with the alpha of the best validation."""
    options = dict(OPTIONS.get(name, {}))
    if name.startswith("adamerging"):
        options["start"] = START * len(vectors.tasks) / len(vectors)
    place, began = InPlace(bench.model, vectors.names), clock()
    found = DATA_METHODS[name](vectors, bench.model, data_of(vectors, problems), **options)
    change = functools.cache(found.change)
    size = found.vectors.nbytes if isinstance(found, Stitched) else None
    cells = [bench.cell(name, place, change, 1.0, began, vectors, size)]
    if name in UNSCALED:
        alpha = search(place, change, problems, first_guess(name, vectors))
        cells.append(bench.cell(f"{name}, scaled", place, change, alpha, began, vectors, size))
    return cells


# Every method of the two registries is a row; a new kind of method is one more line.
ROWS: dict[str, Callable[[str, Vectors, Bench, Mapping[str, Problem]], list[Cell]]] = {
    **{name: without_data for name in METHODS if name != "mean"},  # with an alpha, the mean is task arithmetic
    **{name: with_data for name in DATA_METHODS if name != "fisher_empirical"},
}


def run(bench: Bench, names: Sequence[str], kept: int, seed: int, save: Callable[[Any], object]) -> dict[str, Any]:
    """{column: {row: Cell}} and what they were made of; ``save`` gets it whenever a row is complete."""
    kinds = kinds_of(bench.vectors, kept, seed)
    columns: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    found = {"tasks": list(bench.own), "own": bench.own, "columns": columns, "validation": bench.validation}
    with tqdm(total=len(kinds) * len(names), disable=None, leave=False) as bar:
        for name in names:
            for kind, vectors in kinds.items():
                bar.set_description(f"{name}, {kind}")
                count = max(1, round(bench.validation * len(vectors) / len(vectors.tasks)))
                problems = {task: subsampled(problem, count) for task, problem in bench.problems.items()}
                columns[kind] |= {cell.row: asdict(cell) for cell in ROWS[name](name, vectors, bench, problems)}
                bar.update()
            save(found)
    return found


def show(found: Mapping[str, Any], console: Console) -> None:
    columns = found["columns"]
    rows = list(next(iter(columns.values())))
    for title, text in (
        ("normalised accuracy, % (alpha)", lambda cell: f"{100 * cell['mean']:.1f} ({cell['alpha']:g})"),
        ("seconds (of the processor)", lambda cell: f"{cell['seconds']:.0f} ({cell['processor']:.0f})"),
        ("bytes kept", lambda cell: readable_size(cell["bytes"])),
    ):
        table = Table("method", *columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(row, *(text(columns[kind][row]) for kind in columns))
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six methods, fewer sentences and steps")
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), help="these rows only")
    parser.add_argument("--num-bases", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of RandSelect")
    parser.add_argument("--workdir", type=Path, default=DEFAULT_WORKDIR, help="where the demo keeps its models")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    names = options.methods or (QUICK if options.quick else list(ROWS))
    validation, test = (16, 50) if options.quick else (24, 100)
    bench = Bench.prepare(options.workdir.expanduser().absolute(), SETTINGS, validation, test)
    save = functools.partial(write_json, options.json) if options.json else lambda found: None
    if options.quick:
        OPTIONS.update(QUICK_OPTIONS)
    found = run(bench, names, options.num_bases, options.seed, save)
    show(found, Console(width=110))
    return found


if __name__ == "__main__":
    main()
