"""Forgetting with lm-eval's tasks as target and control: the largest alpha that the control allows, for every way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.coefficients import Metrics
from tvbases_hf.learning.directions import COMPONENTS, Direction, direction
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.learning.negation import ALPHAS, KEEP, Negation, negate
from tvbases_hf.methods.devec import Options
from tvbases_hf.models.gram import gram_matrix
from tvbases_hf.models.vectors import Vectors

from .evaluate import Measured, Session
from .plan import Plan
from .toxicity import METRICS
from .variants import Variant

TARGET = "target"


@dataclass(frozen=True)
class Request:
    """What is forgotten, and how; ``components`` are the ways whose curves are wanted."""

    forget: str
    components: tuple[str, ...] = COMPONENTS
    options: Options = field(default_factory=lambda: Options(pool="iterative"))
    num_bases: float = 0.5
    keep: float = KEEP
    alphas: Sequence[float] = ALPHAS
    whole_curve: bool = True
    even_errors: bool = False


def directions(vectors: Vectors, request: Request) -> dict[str, Direction]:
    """The changes to negate, by component. Raises ParameterError as ``direction`` does."""
    gram = gram_matrix(vectors) if "reconstructed" in request.components and len(vectors) > 1 else None
    bases = {"num_bases": request.num_bases, "even_errors": request.even_errors}
    how = {"options": request.options, **bases, "gram": gram}
    return {component: direction(vectors, request.forget, component, **how) for component in request.components}


def curves(
    vectors: Vectors, found: Mapping[str, Direction], variant: Variant, request: Request, plan: Plan
) -> dict[str, Negation]:
    """Target and controls over alpha for every direction, and the alpha that the control rule chooses for each.

    Raises ParameterError without a target or a control, and where a metric could not be measured.
    """
    check_plan(plan)
    session = Session.open(plan)
    place = InPlace(variant.model, vectors.names)

    def metrics(model: Any) -> dict[str, float]:
        return worth(session.measure(model, variant.tokenizer), plan)

    before = metrics(variant.model)
    patience = None if request.whole_curve else 4
    return {
        component: negate(
            place,
            change,
            _after(before, metrics),
            TARGET,
            keep=request.keep,
            alphas=request.alphas,
            patience=patience,
        )
        for component, change in found.items()
    }


def _after(before: dict[str, float], metrics: Metrics) -> Metrics:
    """The metrics, of which the first, those at alpha 0, are known: they are the same for every direction."""
    known = [before]
    return lambda model: known.pop() if known else metrics(model)


def check_plan(plan: Plan) -> None:
    """ParameterError unless something should fall and something should stay."""
    for role, names, example in (
        ("target", plan.targets, "--target tvbases_toxigen_generate"),
        ("control", plan.controls, "--control gsm8k"),
    ):
        if not names:
            raise ParameterError(f"choosing alpha needs a {role}: {example}, or text:FILE; or give --alpha")


def worth(measured: Measured, plan: Plan) -> dict[str, float]:
    """One number per control, higher is better, and one for all targets, lower is better: what is left of them.

    Of the metrics of a task the first counts for which higher is better; of a perplexity the inverse, so that 95 % kept
    is a perplexity 5.3 % higher; of generated toxicity the toxic rate.
    """
    chosen: dict[str, float] = {}
    for (task, metric), (value, _, better) in measured.items():
        if task not in chosen and (metric == METRICS[0] or better or "perplexity" in metric):
            chosen[task] = value if metric == METRICS[0] or better else 1 / value
    targets = [chosen[task] for task in plan.targets if task in chosen]
    lost = [task for task in (*plan.targets, *plan.controls) if task not in chosen and task in _plain(measured, plan)]
    if not targets or lost or not all(map(math.isfinite, chosen.values())):
        named = lost or [task for task in plan.targets if task not in chosen] or [t for t in chosen]
        raise ParameterError(
            f'"{named[0]}" gives no number to go by: all of its scores failed, or it has no metric for which higher is '
            "better and no perplexity; look at it with tvbases evaluate"
        )
    controls = {task: value for task, value in chosen.items() if task not in plan.targets}
    return {TARGET: sum(targets) / len(targets), **controls}


def _plain(measured: Measured, plan: Plan) -> set[str]:
    """The tasks that were measured under their own name; groups without a number are there as their parts."""
    return {task for task, _ in measured} & set(plan.names)
