"""What a search over alpha measured: saved with the model, drawn, read by programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ParameterError
from ..storage.json_files import read_json
from ..storage.reports import write_report


@dataclass(frozen=True)
class Curve:
    """Metrics over ascending alphas, and the alpha that was ``chosen`` among them.

    ``metrics`` has one tuple per task, ``scores`` is what alphas were compared by: the mean metric, divided by the
    metrics ``own`` of the tasks' own models where they are known.
    """

    alphas: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]
    scores: tuple[float, ...]
    chosen: float
    own: dict[str, float] | None = None

    @classmethod
    def of(cls, found: Mapping[float, Mapping[str, float]], chosen: float, own: Mapping[str, float] | None) -> Curve:
        """From {alpha: {task: metric}}.

        Raises ParameterError for metrics of other tasks at another alpha, and for scores that are all NaN.
        """
        tasks = list(next(iter(found.values())))
        for alpha, metrics in found.items():
            if list(metrics) != tasks:
                raise ParameterError(
                    f"alpha {alpha:g} was measured on {', '.join(metrics)}, others on {', '.join(tasks)}"
                )
        scores = tuple(score_of(metrics, own) for metrics in found.values())
        if all(math.isnan(score) for score in scores):
            raise ParameterError(
                f"the metric is NaN at all of {len(scores)} alphas: the base, the change or the data holds NaN"
            )
        columns = {task: tuple(metrics[task] for metrics in found.values()) for task in tasks}
        return cls(tuple(found), columns, scores, chosen, None if own is None else dict(own))

    @property
    def best(self) -> float:
        """The score at the chosen alpha."""
        return self.scores[self.alphas.index(self.chosen)]

    def at(self, alpha: float) -> dict[str, float]:
        """The metrics at one of the alphas, by task. Raises ParameterError for one that was not measured."""
        if alpha not in self.alphas:
            raise ParameterError(
                f"alpha {alpha:g} was not measured; these were: {', '.join(map('{:g}'.format, self.alphas))}"
            )
        index = self.alphas.index(alpha)
        return {task: values[index] for task, values in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; NaN, which JSON does not have, becomes null."""
        return {
            "chosen": self.chosen,
            "alphas": list(self.alphas),
            "scores": _written(self.scores),
            "metrics": {task: _written(values) for task, values in self.metrics.items()},
            "own": self.own,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Curve:
        """The inverse of to_json; CheckpointError for anything else."""
        try:
            curve = cls(
                tuple(float(alpha) for alpha in value["alphas"]),
                {str(task): _read(values) for task, values in value["metrics"].items()},
                _read(value["scores"]),
                float(value["chosen"]),
                value["own"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"not a curve over alpha ({type(error).__name__}: {error})") from error
        lengths = {len(values) for values in (curve.scores, *curve.metrics.values())}
        if lengths != {len(curve.alphas)} or curve.chosen not in curve.alphas:
            raise CheckpointError(
                "not a curve over alpha: its columns are of different lengths, or its choice is absent"
            )
        return curve

    def save(self, file: str | Path) -> None:
        """Write the curve as JSON; OutputError where that is impossible, and for a file that is not ours."""
        write_report(file, self.to_json())

    @classmethod
    def load(cls, file: str | Path) -> Curve:
        """Read what save wrote; CheckpointError for a file that is absent or something else."""
        try:
            value = read_json(Path(file))
        except (OSError, ValueError) as error:
            raise CheckpointError(f'"{file}": cannot be read as a curve ({error})') from error
        return cls.from_json(value)


def normalised_accuracy(merged: Mapping[str, float], own: Mapping[str, float]) -> float:
    """Mean over the tasks of accuracy(merged model) / accuracy(the task's own model).

    Raises ParameterError for a task without an own accuracy, and for one whose own is zero or NaN.
    """
    missing = [task for task in merged if task not in own]
    if missing:
        raise ParameterError(
            f'{len(missing)} of {len(merged)} tasks have no accuracy of their own (first: "{missing[0]}")'
        )
    useless = [task for task in merged if not own[task] > 0]
    if useless:
        raise ParameterError(
            f'the accuracy of "{useless[0]}"\'s own model is {own[useless[0]]:g}: nothing can be measured against it'
        )
    return sum(merged[task] / own[task] for task in merged) / len(merged)


def score_of(metrics: Mapping[str, float], own: Mapping[str, float] | None = None) -> float:
    """The mean metric, normalised where the tasks' own are known. Raises ParameterError for no metric."""
    if not metrics:
        raise ParameterError("no metric was measured; give the data of one task at least")
    return normalised_accuracy(metrics, own) if own is not None else sum(metrics.values()) / len(metrics)


def _written(values: tuple[float, ...]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _read(values: list[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)
