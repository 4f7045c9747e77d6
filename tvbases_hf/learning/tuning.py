"""How much of a merge to add: the scale that is best for the targets while the controls stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..defaults import KEEP, SCALES
from ..errors import CheckpointError, ParameterError, did_you_mean
from ..storage.run import bar
from .coefficients import NON_NEGATIVE, Metrics, check_alphas, climb
from .curve import Curve, score_of
from .inplace import Change, InPlace
from .negation import ROUNDING

PATIENCE = 2


@dataclass(frozen=True)
class Tuning:
    """Metrics over the scales that were measured, of which the first is 0, the base itself; higher is better.

    The curve's scores are the means over the ``targets``; ``chosen`` is 0 where no scale is better than the base on all
    of them with every control kept. ``units`` tells what the numbers are, where that is known.
    """

    targets: tuple[str, ...]
    controls: tuple[str, ...]
    keep: float
    curve: Curve
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        return self.curve.chosen

    @property
    def helps(self) -> bool:
        return self.alpha > 0

    def lost(self, alpha: float) -> tuple[str, ...]:
        """The controls of which less than the share to keep is left."""
        return _lost(self.curve.at(alpha), self.curve.at(0.0), self.controls, self.keep)

    def worse(self, alpha: float) -> tuple[str, ...]:
        """The targets that are no better than those of the base."""
        return _worse(self.curve.at(alpha), self.curve.at(0.0), self.targets)

    def guarded(self, metrics: Metrics) -> Metrics:
        """The metrics of the targets, which are minus infinity where a control is lost or a target does not rise."""
        before = self.curve.at(0.0)

        def allowed(model: nn.Module) -> dict[str, float]:
            now = metrics(model)
            harms = _lost(now, before, self.controls, self.keep) or _worse(now, before, self.targets)
            return {task: -math.inf if harms else now[task] for task in self.targets}

        return allowed

    def summary(self) -> str:
        """What was found, in one line."""
        before = self.curve.scores[0]
        if self.helps:
            line = f"alpha {self.alpha:g}: mean of the targets {before:.4g} -> {self.curve.best:.4g}"
            left = [self.curve.at(self.alpha)[c] / self.curve.at(0.0)[c] for c in self.controls]
            line += f", controls at least {min(left):.1%} kept" if left else ""
            ends = self.alpha == self.curve.alphas[-1]
            return line + ("; the grid ends here, a greater alpha may be better" if ends else "")
        nearest = max(self.curve.alphas[1:], key=lambda a: (-len(self.worse(a)) - len(self.lost(a)), self._score(a)))
        faults = [f'"{task}" is no better than the base\'s' for task in self.worse(nearest)]
        faults += [f'of "{task}" less than {self.keep:.0%} is left' for task in self.lost(nearest)]
        return (
            f"do not merge these: none of {len(self.curve.alphas) - 1} alphas from {self.curve.alphas[1]:g} to "
            f"{self.curve.alphas[-1]:g} is better than the base on all targets with every control kept; nearest is "
            f"{nearest:g}, where {' and '.join(faults)}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "targets": list(self.targets),
            "controls": list(self.controls),
            "keep": self.keep,
            "helps": self.helps,
            "curve": self.curve.to_json(),
            "units": dict(self.units),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tuning:
        """The inverse of to_json; CheckpointError for anything else."""
        try:
            head = tuple(value["targets"]), tuple(value["controls"]), float(value["keep"])
            return cls(*head, Curve.from_json(value["curve"]), dict(value.get("units") or {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a tuning ({type(error).__name__}: {error})") from error

    def _score(self, alpha: float) -> float:
        return self.curve.scores[self.curve.alphas.index(alpha)]


def tune(
    place: InPlace,
    change: Change,
    metrics: Metrics,
    targets: Sequence[str],
    *,
    keep: float = KEEP,
    alphas: Sequence[float] = SCALES,
    start: float = 1.0,
    units: Mapping[str, str] | None = None,
) -> Tuning:
    """theta_0 + alpha * change at the alpha with the best mean of the targets, all of them better than theta_0's.

    The grid is walked from ``start`` down and up until it gets worse. Only if nothing helps all targets there, every
    alpha is measured before that is said.

    Args:
        place: theta_0, whose weights are bit-identical afterwards.
        change: the merged change; give ``functools.cache(change)`` if it is expensive to compute and fits into memory.
        metrics: of the targets and of the controls, which are all the other tasks; higher is better.
        keep: the share of every control's metric that has to stay.

    Raises:
        ParameterError: no target, alphas or a share outside their domain, or a control that is zero, negative or NaN
            for theta_0.
    """
    if not 0 < keep <= 1:
        raise ParameterError(f"the share of a control to keep lies in (0, 1]; got {keep:g}")
    grid = check_alphas(sorted({*alphas} - {0.0}), NON_NEGATIVE)
    found: dict[float, dict[str, float]] = {}
    with bar("Tuning", len(grid) + 1, "model") as shown:

        def measured(alpha: float) -> dict[str, float]:
            if alpha not in found:
                with place.changed(change, alpha) as model:
                    found[alpha] = dict(metrics(model))
                shown.set_postfix(alpha=f"{alpha:g}")
                shown.update()
            return found[alpha]

        before = measured(0.0)
        controls = _controls(before, targets)

        def score(alpha: float) -> float:
            now = measured(alpha)
            return -math.inf if _lost(now, before, controls, keep) else _mean(now, targets)

        def helping() -> list[float]:
            return [alpha for alpha in sorted(found) if alpha and not math.isinf(score(alpha))
                    and not _worse(found[alpha], before, targets)]  # fmt: skip

        first = min(range(len(grid)), key=lambda index: abs(grid[index] - start))
        climb(lambda index: score(grid[index]), len(grid), first, patience=PATIENCE, plateaus=True)
        if not helping():
            for alpha in grid:
                measured(alpha)
        chosen = max(helping(), key=score, default=0.0)
    ordered = {alpha: found[alpha] for alpha in sorted(found)}
    columns = {task: tuple(row[task] for row in ordered.values()) for task in before}
    scores = tuple(_mean(row, targets) for row in ordered.values())
    return Tuning(tuple(targets), controls, keep, Curve(tuple(ordered), columns, scores, chosen), dict(units or {}))


def _controls(before: Mapping[str, float], targets: Sequence[str]) -> tuple[str, ...]:
    missing = [task for task in targets if task not in before]
    if missing or not targets:
        name = missing[0] if missing else ""
        raise ParameterError(f'no metric of the target "{name}"{did_you_mean(name, before)}; give its data')
    controls = tuple(task for task in before if task not in targets)
    for task in controls:
        if not before[task] > 0:
            raise ParameterError(
                f'the metric of the control "{task}" is {before[task]:g} for the base itself: no share of it can be '
                "kept. Choose a control that the base can do, with a metric where higher is better"
            )
    return controls


def _lost(
    now: Mapping[str, float], before: Mapping[str, float], controls: Sequence[str], keep: float
) -> tuple[str, ...]:
    return tuple(task for task in controls if not now[task] >= keep * before[task] * (1 - ROUNDING))


def _worse(now: Mapping[str, float], before: Mapping[str, float], targets: Sequence[str]) -> tuple[str, ...]:
    return tuple(task for task in targets if not now[task] > before[task])


def _mean(metrics: Mapping[str, float], targets: Sequence[str]) -> float:
    return score_of({task: metrics[task] for task in targets})
