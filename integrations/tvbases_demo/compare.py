"""The methods compared: each merges by adding some vectors to the base, with one scale chosen on validation data.

All of them are theta_0 + alpha * sum_i w_i tau_i for weights w [T] over the tasks: all vectors have w = 1, M bases have
w = encoder @ 1, a selection has zeros. So one evaluator serves them all, without writing a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvbases_hf.bases import BasisWeights, ae_bases, pca_bases, rand_select
from tvbases_hf.learning.coefficients import climb
from tvbases_hf.models.vectors import Vectors

from .encoder import Examples, Problem, accuracies

# M convex bases are shorter than T task vectors by T / M, so the grid goes beyond 1.
ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0)
FIRST_GUESS = 0.3  # effective weight per task where the search for alpha starts


@dataclass(frozen=True)
class Method:
    """A way to keep fewer vectors, with several candidates where chance is involved. `weights` are [T] each."""

    key: str
    title: str
    vectors: int
    weights: list[Tensor]


@dataclass(frozen=True)
class Result:
    """Per cent correct per candidate and task, and the alpha of each candidate; no alpha where nothing is merged."""

    key: str
    title: str
    vectors: int
    accuracy: list[list[float]]
    alpha: list[float] = field(default_factory=list)

    @property
    def tasks(self) -> list[float]:
        """[T] mean over the candidates."""
        return torch.tensor(self.accuracy, dtype=torch.float64).mean(0).tolist()

    @property
    def candidates(self) -> list[float]:
        """Mean over the tasks, per candidate."""
        return torch.tensor(self.accuracy, dtype=torch.float64).mean(1).tolist()

    @property
    def mean(self) -> float:
        return sum(self.candidates) / len(self.candidates)

    @property
    def spread(self) -> float:
        """Standard deviation over the candidates; 0 for one."""
        return torch.tensor(self.candidates).std().item() if len(self.candidates) > 1 else 0.0


def methods(gram: Tensor, bases: Tensor, paper_seeds: int, subsets: int) -> list[Method]:
    """What is compared, given the Gram matrix [T, T] and the encoder [T, M] of the compressed basis."""
    total, kept = bases.shape
    paper = [ae_bases(gram, kept, solver="adam", balance=False, seed=seed) for seed in range(paper_seeds)]
    return [
        Method("task_arithmetic", "task arithmetic, all vectors", total, [torch.ones(total, dtype=torch.float64)]),
        Method("ae_bases", "ae_bases, balanced", kept, [bases.sum(1)]),
        Method("ae_bases_paper", "autoencoder of the paper", kept, [p.effective_weights for p in paper]),
        Method("rand_select", "RandSelect", kept, [s.effective_weights for s in selections(gram, kept, subsets)]),
        Method("pca_bases", "PCA", kept, [pca_bases(gram, kept).effective_weights]),
    ]


def selections(gram: Tensor, kept: int, count: int) -> Iterator[BasisWeights]:
    """`count` different random selections of `kept` tasks, in the order of their seeds; fewer if there are no more."""
    found: set[tuple[float, ...]] = set()
    for seed in range(20 * count):
        selection = rand_select(gram, kept, seed=seed)
        chosen = tuple(selection.effective_weights.tolist())
        if chosen not in found and len(found) < count:
            found.add(chosen)
            yield selection


class Merger:
    """Evaluates theta_0 + sum_i w_i tau_i in memory; the T task vectors are kept there, float32."""

    def __init__(self, model: nn.Module, vectors: Vectors, problems: Mapping[str, Problem]) -> None:
        """`model` is the base; its weights are overwritten by every evaluation."""
        self.model = model
        self.problems = problems
        self.base = {name: vectors.base.read(name).clone() for name in vectors.names}
        self.deltas = {
            name: torch.stack([d.block(0, base.numel()).float().view_as(base) for d in vectors.deltas(name)])
            for name, base in self.base.items()
        }
        self._known: dict[tuple, list[float]] = {}

    def merged(self, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor) for weights [T]."""
        for name, base in self.base.items():
            yield name, base + torch.tensordot(weights.to(base.dtype), self.deltas[name], dims=1)

    @torch.no_grad()
    def accuracy(self, weights: Tensor, split: str, limit: int | None = None, only: str | None = None) -> list[float]:
        """[T] per cent correct on the first `limit` examples of a split, or [1] for one task.

        The same weights are evaluated once, whatever method they come from.
        """
        known = (tuple(round(w, 9) for w in weights.tolist()), split, limit, only)
        if known not in self._known:
            parameters = dict(self.model.named_parameters())
            for name, tensor in self.merged(weights):
                parameters[name].copy_(tensor)
            problems = self.problems if only is None else {only: self.problems[only]}
            self._known[known] = evaluate(self.model, problems, split, limit)
        return self._known[known]

    def best_alpha(self, weights: Tensor, limit: int | None) -> float:
        """The alpha of the best mean validation accuracy, by climbing the grid from a first guess."""

        def score(index: int) -> float:
            return sum(self.accuracy(ALPHAS[index] * weights, "val", limit))

        guess = FIRST_GUESS * len(weights) / float(weights.abs().sum())
        best = climb(score, len(ALPHAS), min(range(len(ALPHAS)), key=lambda i: abs(ALPHAS[i] - guess)))
        return ALPHAS[best]


def evaluate(model: nn.Module, problems: Mapping[str, Problem], split: str, limit: int | None = None) -> list[float]:
    """[T] per cent correct of one model on every task."""
    tasks = [(p.head, examples_of(p, split)) for p in problems.values()]
    return accuracies(model, [(head, examples.first(limit or len(examples))) for head, examples in tasks])


def examples_of(problem: Problem, split: str) -> Examples:
    return {"train": problem.train, "val": problem.val, "test": problem.test}[split]


def compare(merger: Merger, chosen: list[Method], limit: int | None, quiet: bool) -> list[Result]:
    """Choose alpha on validation data and measure on test data, for every candidate of every method."""
    results = []
    with tqdm(total=sum(len(m.weights) for m in chosen), disable=True if quiet else None, leave=False) as bar:
        for method in chosen:
            bar.set_description(f"Evaluating {method.title}")
            alphas, accuracies = [], []
            for weights in method.weights:
                alphas.append(merger.best_alpha(weights, limit))
                accuracies.append(merger.accuracy(alphas[-1] * weights, "test"))
                bar.update()
            results.append(Result(method.key, method.title, method.vectors, accuracies, alphas))
    return results
