"""Forgetting a task: theta_0 - alpha * change, as far as what should stay does (Ilharco et al., 2023; AE paper, 4.2).

The change is a task vector, its reconstruction from bases or its unique component: nothing here asks which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..defaults import ALPHAS, KEEP
from ..errors import CheckpointError, ParameterError, did_you_mean
from ..models.vectors import Vectors
from ..storage.run import bar
from .coefficients import NON_NEGATIVE, PATIENCE, Metrics, check_alphas
from .curve import Curve, score_of
from .inplace import Change, InPlace

# Accuracies are quotients of small numbers: one that equals the limit must not miss it by a rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Negation:
    """The chosen alpha, and the metrics of target and controls over all that were measured; the first alpha is 0.

    ``units`` tells what the numbers of target and controls are, where that is known.
    """

    target: str
    controls: tuple[str, ...]
    keep: float
    curve: Curve
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        return self.curve.chosen

    def target_at(self, alpha: float) -> float:
        """What is left of the target; lower is better."""
        return self.curve.at(alpha)[self.target]

    def control_at(self, alpha: float) -> float:
        """Mean metric of the controls."""
        return self.curve.scores[self.curve.alphas.index(alpha)]

    @property
    def kept(self) -> float:
        """Share of the control metric that is left at the chosen alpha."""
        return self.control_at(self.alpha) / self.control_at(0.0)

    @property
    def fell(self) -> bool:
        """Whether the target is lower at the chosen alpha than without any change."""
        return self.target_at(self.alpha) < self.target_at(0.0)

    def summary(self) -> str:
        """What was reached, in one line, and what a reader should know about it."""
        before, after = self.target_at(0.0), self.target_at(self.alpha)
        line = (
            f"alpha {self.alpha:g}: {self._named(self.target)} {before:.4g} -> {after:.4g}, "
            f"{self._control_named()} {self.control_at(0.0):.4g} -> {self.control_at(self.alpha):.4g} "
            f"({self.kept:.1%} kept)"
        )
        if self.alpha == 0:
            return f"{line}; every alpha above 0 costs the control more than {1 - self.keep:.0%}: nothing is forgotten"
        if not self.fell:
            line += "; the target did not fall: by this metric nothing is forgotten"
        if self.alpha == self.curve.alphas[-1]:
            return f"{line}; the grid ends here, a greater alpha may forget more"
        return line

    def _named(self, task: str) -> str:
        return f'"{task}" ({self.units[task]})' if self.units.get(task) else f'"{task}"'

    def _control_named(self) -> str:
        units = list(dict.fromkeys(self.units[task] for task in self.controls if task in self.units))
        return f"control ({', '.join(units)})" if units else "control"

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "controls": list(self.controls),
            "keep": self.keep,
            "kept": self.kept,
            "curve": self.curve.to_json(),
            "units": dict(self.units),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Negation:
        """The inverse of to_json; CheckpointError for anything else."""
        try:
            head = str(value["target"]), tuple(value["controls"]), float(value["keep"])
            return cls(*head, Curve.from_json(value["curve"]), dict(value.get("units") or {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a negation ({type(error).__name__}: {error})") from error


def negate(
    place: InPlace,
    change: Change,
    metrics: Metrics,
    target: str,
    *,
    keep: float = KEEP,
    alphas: Sequence[float] = ALPHAS,
    expected: float | None = None,
    patience: int | None = PATIENCE,
    units: Mapping[str, str] | None = None,
) -> Negation:
    """theta_0 - alpha * change with the largest alpha for which the control keeps its share ``keep`` of theta_0's.

    Args:
        place: theta_0, whose weights are bit-identical afterwards.
        change: what is taken away, for example change_of(vectors, "toxic").
        metrics: of the target and of the controls, which are all the other tasks; their mean is the control metric.
        expected: what the control metric of theta_0 should be, where that is known.
        patience: the grid is left after so many alphas in a row that cost too much; None measures all of it.
        units: what the numbers of target and controls are, for the reader.

    Raises:
        ParameterError: no such target, no control, alphas or a share outside their domain; a control metric that is
            zero, negative or NaN for theta_0, or already below ``keep`` of what is expected.
    """
    if not 0 < keep <= 1:
        raise ParameterError(
            f"the share of the control metric to keep lies in (0, 1], got {keep:g}; the papers use 0.95"
        )
    grid = check_alphas(sorted({0.0, *alphas}), NON_NEGATIVE)
    found: dict[float, dict[str, float]] = {}
    with bar(f"Forgetting {target}", len(grid), "model") as shown:
        chosen, misses, limit = 0.0, 0, -math.inf
        for alpha in grid:
            with place.changed(change, -alpha) as model:
                found[alpha] = dict(metrics(model))
            control = _control(found[alpha], target)
            if alpha == 0:
                _check_control(control, keep, expected)
                limit = keep * control * (1 - ROUNDING)
            chosen, misses = (alpha, 0) if control >= limit else (chosen, misses + 1)
            shown.set_postfix(alpha=f"{alpha:g}", control=f"{control:.4g}")
            shown.update()
            if patience is not None and misses >= patience:
                break
    controls = tuple(task for task in found[0.0] if task != target)
    columns = {task: tuple(metrics[task] for metrics in found.values()) for task in found[0.0]}
    scores = tuple(_control(metrics, target) for metrics in found.values())
    return Negation(target, controls, keep, Curve(tuple(found), columns, scores, chosen), dict(units or {}))


def change_of(vectors: Vectors, label: str) -> Change:
    """One of several vectors, by its label: a task vector, a reconstruction or a basis.

    Raises ParameterError for a label that there is not.
    """
    if label not in vectors.labels:
        raise ParameterError(
            f'no vector "{label}"{did_you_mean(label, vectors.labels)}; there are {", ".join(vectors.labels)}'
        )
    index = vectors.labels.index(label)
    return lambda name: vectors.deltas(name)[index]


def _control(metrics: Mapping[str, float], target: str) -> float:
    if target not in metrics:
        raise ParameterError(f'no metric of the target "{target}"{did_you_mean(target, metrics)}; give its data')
    controls = {task: value for task, value in metrics.items() if task != target}
    if not controls:
        raise ParameterError(f'there is data of "{target}" only; forgetting needs a control task that should stay')
    return score_of(controls)


def _check_control(control: float, keep: float, expected: float | None) -> None:
    if not control > 0:
        raise ParameterError(
            f"the control metric of the model itself is {control:g}: no share of it can be kept. Choose a control task "
            "that the model can do, with a metric where higher is better"
        )
    if expected is not None and not control >= keep * expected * (1 - ROUNDING):
        raise ParameterError(
            f"the control metric of the model itself is {control:.4g}, already below {keep:.0%} of the {expected:.4g} "
            "that it should be; check that this is the base model and that its data is read as it should be"
        )
