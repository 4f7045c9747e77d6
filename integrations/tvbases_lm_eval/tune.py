"""The scale of a merge, chosen by lm-eval's tasks or by data of one's own, and the merge at that scale."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tvbases_hf.defaults import KEEP, SCALES
from tvbases_hf.errors import ParameterError, TvbasesError
from tvbases_hf.learning.coefficients import coordinate_search
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.devec import devec
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.learning.tuning import Tuning, tune
from tvbases_hf.merging.fit import Limits
from tvbases_hf.merging.merge import Merge
from tvbases_hf.merging.write import check_adapter, write
from tvbases_hf.methods.devec import Options
from tvbases_hf.models.vectors import Vectors

from .evaluate import Session
from .forget import counted, inverted
from .plan import Plan
from .toxicity import METRICS
from .variants import BEFORE, Where, opened


def tune_merge(
    merge: Merge,
    out: str | Path,
    plan: Plan,
    *,
    keep: float = KEEP,
    alphas: Sequence[float] = SCALES,
    device: str | None = None,
    as_adapter: bool = False,
    limits: Limits | None = None,
    dtype: torch.dtype | None = None,
    summands: tuple[Vectors, float] | None = None,
    trained: Options | None = None,
) -> dict[str, Any]:
    """Measure theta_0 + alpha * the merged change in place, and write it at the alpha that is best for the targets.

    The merged change is computed once and held whole, in float32, beside the model that is measured.

    Args:
        plan: its targets should rise, and all of its data that is no control; every control keeps its share ``keep``.
            Of a perplexity the inverse counts, of generated toxicity the rate of what is not toxic.
        device: where the model is measured; None: a GPU if there is one.
        as_adapter, limits, dtype: as ``write`` takes them.
        summands: vectors and the scale at which the merge is their sum: each then gets an alpha of its own, from the
            common one on and never worse than that (see coordinate_search).
        trained: DeVec's protocol instead of the merge's own sum, decomposed so: a coefficient for each vector and for
            what each pair shares, trained on the data of the targets before the scale is measured.

    Returns the report of the merge with ``alpha`` and ``tuning``, and ``coefficients`` by summand. Where no alpha helps
    there is no ``out`` in it, and nothing is written.

    Raises ParameterError as ``tune`` does, MissingExtraError without lm-eval where one of its tasks is named.
    """
    targets = (*plan.targets, *(name for name in plan.data if name not in (*plan.targets, *plan.controls)))
    if not targets:
        raise ParameterError("tuning needs a target: --target gsm8k, text:FILE, or --data NAME=FILE")
    if as_adapter:
        check_adapter(merge.vectors, limits or Limits())
    session = Session.open(plan)
    variant = opened(BEFORE, merge.base.path or merge.base.label, Where(device))
    data, notes = session.data(variant)
    if trained:
        merge, learned = _trained(merge, variant.model, [task for task in data if task.name in targets], trained)
        notes = [*notes, learned]
    change = functools.cache(merge.change)
    units: dict[str, str] = {}

    def metrics(model: Any) -> dict[str, float]:
        found, worth = session.measure(model, variant.tokenizer, data), {}
        for task, metric in counted(found).items():
            worth[task], units[task] = _higher_is_better(found[task, metric][0], metric, inverted(found, task, metric))
        lost = [name for name in plan.names if name not in worth]
        if lost:
            raise ParameterError(
                f'"{lost[0]}" gives no number to go by: all of its scores failed, or it has no metric for which higher '
                "is better and no perplexity; look at it with tvbases evaluate"
            )
        return {name: worth[name] for name in plan.names}

    place = InPlace(variant.model, merge.names)
    tuning = tune(place, change, metrics, targets, keep=keep, alphas=alphas, units=units)
    report = {"base": merge.base.label, "alpha": tuning.alpha, "tuning": tuning.to_json(), "warnings": notes}
    if not tuning.helps:
        return report
    scaled = merge.scaled(tuning.alpha)
    if summands is not None:
        vectors, scale = summands
        found = coordinate_search(
            place, vectors, tuning.guarded(metrics), tuning.alpha * scale, alphas=[scale * alpha for alpha in alphas]
        )
        report["coefficients"] = dict(zip(found.labels, found.alphas, strict=True))
        scaled = merge.summing(vectors, found.alphas)
    written = write(scaled, out, as_adapter=as_adapter, limits=limits, dtype=dtype)
    return report | written | {"warnings": [*notes, *written["warnings"]]}


def _trained(merge: Merge, model: Any, data: Sequence[TaskData], options: Options) -> tuple[Merge, str]:
    """With coefficients that are learned from data, and what they are."""
    if not data:
        raise ParameterError("pairs: trained needs the data of a target: --data NAME=FILE")
    found = devec(merge.vectors, model, data, options=options)
    names = dict(zip(found.vectors.labels, found.values[:, 0].tolist(), strict=True))
    line = "trained coefficients: " + ", ".join(f"{name} {value:.3g}" for name, value in names.items())
    recipe = f"{merge.recipe}# trained coefficients {names}\n"
    return replace(merge, combine=lambda name, _: found.change(name), stream=None, recipe=recipe), line


class DoNotMerge(TvbasesError):
    """No scale of the merge is better than the base on all targets with every control kept."""


def check_helps(report: dict[str, Any]) -> None:
    """Raise DoNotMerge, which says why, for the report of a tuning that found no scale."""
    tuning = Tuning.from_json(report["tuning"])
    if not tuning.helps:
        raise DoNotMerge(tuning.summary())


def _higher_is_better(value: float, metric: str, is_inverted: bool) -> tuple[float, str]:
    if metric == METRICS[0]:
        return 1 - value, f"1 - {metric}"
    return (1 / value, f"1/{metric}") if is_inverted else (value, metric)
