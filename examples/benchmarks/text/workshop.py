"""What every study works with: the base in memory, the tasks, the task vectors, and the accuracy of any change."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence import sources
from evidence.workshop import Workshop as AnyWorkshop
from torch import Tensor, nn

from tvbases_demo import encoder
from tvbases_demo.encoder import Problem
from tvbases_hf import Vectors, gram_matrix
from tvbases_hf.learning.coefficients import grid_search
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.inplace import Change, InPlace

from . import models
from .settings import ALPHAS, START, Settings

Accuracies = dict[str, float]


@dataclass(frozen=True)
class Tuned:
    """The alpha that validation sentences chose, what each alpha on the way was worth there, and test accuracies."""

    alpha: float
    curve: dict[str, float]
    test: Accuracies

    @property
    def mean(self) -> float:
        return mean(self.test)


class Workshop(AnyWorkshop):
    """One process's view of the work directory; what is read or computed once is kept."""

    settings: Settings

    @functools.cached_property
    def tasks(self) -> dict[str, sources.Task]:
        """All tasks, those that are kept aside too."""
        return sources.load_tasks((*self.settings.tasks, *self.settings.unseen), self.source)

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that decides an answer beside the question."""
        return f"{self.settings.digest()}-{sources.digest(self.tasks)}"

    @functools.cached_property
    def model(self) -> nn.Module:
        """The base. Whoever changes its weights puts them back."""
        return encoder.load(models.base_model(self.workdir))[0]

    @functools.cached_property
    def problems(self) -> dict[str, Problem]:
        """Every task, tokenised and cut to size, with the head that the base makes of its labels."""
        model, tokenizer = encoder.load(models.base_model(self.workdir))
        return {name: self._cut(encoder.prepare(model, tokenizer, task, self.settings.recipe.max_tokens))
                for name, task in self.tasks.items()}  # fmt: skip

    def _cut(self, problem: Problem) -> Problem:
        sizes = {"train": self.settings.train, "val": self.settings.validation, "test": self.settings.test}
        return replace(problem, **{split: getattr(problem, split).first(size) for split, size in sizes.items()})

    def path(self, task: str, seed: int = 0, kind: str = "full") -> Path:
        return models.model_path(self.workdir, kind, seed, task)

    @functools.cache  # noqa: B019 - a workshop lives as long as its process
    def vectors(self, seed: int = 0, kind: str = "full") -> Vectors:
        """The task vectors of the tasks that are merged."""
        paths = {task: self.path(task, seed, kind) for task in self.settings.tasks}
        return Vectors.open(models.base_model(self.workdir), paths)

    @functools.cache  # noqa: B019
    def gram(self, seed: int = 0, kind: str = "full") -> Tensor:
        """[T, T] float64."""
        return gram_matrix(self.vectors(seed, kind)).matrix

    def place(self, seed: int = 0, kind: str = "full") -> InPlace:
        return InPlace(self.model, self.vectors(seed, kind).names)

    def accuracy(self, model: nn.Module, split: str = "test", tasks: Sequence[str] | None = None) -> Accuracies:
        """Per cent correct by task, of the tasks that are merged unless others are named."""
        chosen = {task: self.problems[task] for task in tasks or self.settings.tasks}
        asked = [(p.head, getattr(p, split)) for p in chosen.values()]
        with models.half_precision():
            found = encoder.accuracies(model, asked)
        return dict(zip(chosen, found, strict=True))

    @functools.cache  # noqa: B019
    def zero_shot(self, split: str = "test") -> Accuracies:
        """The base's own accuracies."""
        return self.accuracy(self.model, split)

    def changed(
        self, change: Change, alpha: float = 1.0, *, split: str = "test", tasks: Sequence[str] | None = None, **of: Any
    ) -> Accuracies:
        """Accuracies of theta_0 + alpha * change; ``of`` says whose weights change (seed, kind)."""
        with self.place(**of).changed(change, alpha) as model:
            return self.accuracy(model, split, tasks)

    def tuned(self, change: Change, start: float, **of: Any) -> Tuned:
        """theta_0 + alpha * change at the alpha of the best mean accuracy on the validation sentences of all tasks."""
        change = functools.cache(change)
        curve = grid_search(
            self.place(**of), change, lambda m: self.accuracy(m, "val"), alphas=ALPHAS, start=start, patience=1
        )
        scores = {f"{alpha:g}": score for alpha, score in zip(curve.alphas, curve.scores, strict=True)}
        return Tuned(curve.chosen, scores, self.changed(change, curve.chosen, **of))

    def data(self, tasks: Sequence[str], count: int) -> list[TaskData]:
        """For the methods that need data: ``count`` validation sentences a task, in which every label has its share."""
        problems = {task: self.problems[task] for task in tasks}
        return [
            replace(encoder.problem_data(task, problem, count=count), readout=models.readout_of(problem))
            for task, problem in problems.items()
        ]


def start_of(num_vectors: int, num_tasks: int) -> float:
    """Where the search for alpha begins: a sum of K vectors that stand for T tasks."""
    return START * num_tasks / num_vectors


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
