"""Forgetting with lm-eval's tasks as target and control: the largest alpha that the control allows, for every way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvbases_hf.defaults import ALPHAS, KEEP, NUM_BASES, Host
from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.coefficients import Metrics
from tvbases_hf.learning.directions import (
    COMPONENTS,
    FORGETTING,
    Direction,
    check_component,
    check_tasks,
    direction,
)
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.learning.negation import Negation, negate
from tvbases_hf.merging.changes import Edit
from tvbases_hf.merging.fit import Limits
from tvbases_hf.merging.write import check_adapter, is_checkpoint_of_ours, write
from tvbases_hf.methods.devec import Options
from tvbases_hf.models.gram import gram_matrix
from tvbases_hf.models.lora_files import is_adapter_directory
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.output import check_output, preview

from .evaluate import Measured, Session
from .plan import Plan
from .toxicity import METRICS
from .variants import BEFORE, Variant, Where, opened

TARGET = "target"


@dataclass(frozen=True)
class Forgetting:
    """What is forgotten, and how: ``component`` is negated, by ``alpha`` or by the largest that the control allows.

    ``curve`` measures all of ``alphas``, for every component. ``options`` are those of the unique component,
    ``num_bases`` and ``even_errors`` of the reconstructed one, ``adapter`` writes an adapter of adapters, of
    ``equal_rank`` and such as ``host`` loads.
    """

    task: str | Sequence[str]
    component: str = "plain"
    alpha: float | None = None
    alphas: Sequence[float] = ALPHAS
    keep: float = KEEP
    curve: bool = False
    options: Options = FORGETTING
    num_bases: float = NUM_BASES
    even_errors: bool = False
    adapter: bool = False
    equal_rank: bool = False
    host: Host | None = None

    @property
    def limits(self) -> Limits:
        """Of the adapter that is written."""
        return Limits(equal_rank=self.equal_rank, host=self.host)

    def components(self, vectors: Vectors) -> tuple[str, ...]:
        """Those whose curves are wanted."""
        one = isinstance(self.task, str) or len(self.task) == 1
        return COMPONENTS if self.curve and one and len(vectors) > 1 else (self.component,)

    def directions(self, vectors: Vectors) -> dict[str, Direction]:
        """The changes to negate, by component. Raises ParameterError as ``direction`` does."""
        wanted = self.components(vectors)
        gram = gram_matrix(vectors) if "reconstructed" in wanted and len(vectors) > 1 else None
        how = {"options": self.options, "num_bases": self.num_bases, "even_errors": self.even_errors, "gram": gram}
        return {component: direction(vectors, self.task, component, **how) for component in wanted}


def negate_task(
    vectors: Vectors,
    task: str | Sequence[str],
    out: str | Path,
    plan: Plan | None = None,
    *,
    device: str | None = None,
    dry_run: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Write theta_0 - alpha * change, a model that has forgotten a task, and report alpha and what it cost.

    Args:
        task: the one to forget, or several fine-tunes of it (NegMerge: what all of them changed the same way); the
            others are what it is compared with.
        plan: its targets should fall and its controls stay; they choose alpha where none is given.
        device: where the model is evaluated; None: a GPU if there is one.
        dry_run: check everything and report what would be written.
        how: the fields of Forgetting: component, alpha, alphas, keep, curve, options, num_bases, ...

    Raises:
        ParameterError: an unknown task or component, both alpha and a plan, or neither; metrics to choose by that are
            missing; an adapter of full checkpoints, or of a change without low rank (a DoRA's unique component).
        MissingExtraError: lm-eval is needed to choose alpha, and is not installed.
        OutputError: ``out`` is not ours, or the disk is full.
    """
    request, out = Forgetting(task, **how), Path(out)
    tasks = check_tasks(task, vectors, request.component)
    plan = None if plan is None else plan.forgetting(tasks)
    _check(vectors, request, out, plan)
    if dry_run:
        return preview(out, *_size(vectors, request.adapter))
    found = request.directions(vectors)
    report: dict[str, Any] = {"base": vectors.base.label, "forget": ", ".join(tasks), "component": request.component}
    alpha = request.alpha
    if alpha is None and plan is not None:
        variant = opened(BEFORE, vectors.base.path or vectors.base.label, Where(device))
        negations, notes = curves(vectors, found, variant, request, plan)
        report["curves"] = {name: negation.to_json() for name, negation in negations.items()}
        chosen = negations[request.component]
        alpha = chosen.alpha
        report["warnings"] = notes if chosen.fell else [*notes, f"{request.component}: {chosen.summary()}"]
    assert alpha is not None
    note = f"{' and '.join(tasks)} forgotten, {request.component}, {alpha:g}"
    edit = Edit.of(vectors, found[request.component], note, -alpha)
    written = write(edit, out, as_adapter=request.adapter, limits=request.limits)
    return report | {"alpha": alpha, "out": str(out), "loading": written.get("loading", [])}


def _check(vectors: Vectors, request: Forgetting, out: Path, plan: Plan | None) -> None:
    check_component(request.component, len(vectors))
    if request.alpha is not None and (request.curve or plan):
        raise ParameterError("--alpha says how much; --target, --control, --curve and --plot are for choosing it")
    if request.alpha is not None and not math.isfinite(request.alpha):
        raise ParameterError(f"alpha is {request.alpha:g}; give a finite number")
    if request.alpha is None:
        check_plan(plan or Plan())
    if request.adapter and not vectors.are_adapters:
        raise ParameterError(
            "only adapters can be negated as an adapter, and a task here is a full checkpoint; leave --adapter out"
        )
    if (request.equal_rank or request.host) and not request.adapter:
        raise ParameterError("--equal-rank and --for are of an adapter; add --adapter, or leave them out")
    if request.host:
        check_adapter(vectors, request.limits)
    check_output(out, is_adapter_directory if request.adapter else is_checkpoint_of_ours)


def _size(vectors: Vectors, adapter: bool) -> tuple[int, int | None]:
    """Tensors and bytes of what is written; the rank of an adapter's change is known when it is made."""
    return (len(vectors.names), None) if adapter else (len(vectors.base.tensors), vectors.base.nbytes)


def curves(
    vectors: Vectors, found: Mapping[str, Direction], variant: Variant, request: Forgetting, plan: Plan
) -> tuple[dict[str, Negation], list[str]]:
    """Target and controls over alpha for every direction, and the alpha that the control rule chooses for each.

    After them what a user should know of how the data is read. Raises ParameterError where a metric could not be
    measured.
    """
    session = Session.open(plan)
    place = InPlace(variant.model, vectors.names)
    data, notes = session.data(variant)

    def metrics(model: Any) -> dict[str, float]:
        return worth(session.measure(model, variant.tokenizer, data), plan)

    measured = session.measure(variant.model, variant.tokenizer, data)
    before = worth(measured, plan)
    how: dict[str, Any] = {"keep": request.keep, "alphas": request.alphas, "patience": None if request.curve else 4}
    how["units"] = units(measured, plan)
    found_curves = {
        component: negate(place, change, _after(before, metrics), TARGET, **how) for component, change in found.items()
    }
    return found_curves, notes


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
            raise ParameterError(
                f"choosing alpha needs a {role}: {example}, text:FILE or a NAME of --data; or give --alpha"
            )


def worth(measured: Measured, plan: Plan) -> dict[str, float]:
    """One number per control, higher is better, and one for all targets, lower is better: what is left of them.

    Of the metrics of a task the first counts for which higher is better; of a perplexity the inverse, so that 95 % kept
    is a perplexity 5.3 % higher; of generated toxicity the toxic rate.
    """
    chosen = {}
    for task, metric in counted(measured).items():
        value = measured[task, metric][0]
        chosen[task] = 1 / value if inverted(measured, task, metric) else value
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


def units(measured: Measured, plan: Plan) -> dict[str, str]:
    """What the numbers of ``worth`` are, by the same names."""
    found = {
        task: f"1/{metric}" if inverted(measured, task, metric) else metric
        for task, metric in counted(measured).items()
    }
    targets = [f"{found[task]} of {task}" for task in plan.targets if task in found]
    controls = {task: unit for task, unit in found.items() if task not in plan.targets}
    return {TARGET: ("mean of " if len(targets) > 1 else "") + ", ".join(targets), **controls}


def counted(measured: Measured) -> dict[str, str]:
    """{task: the metric that counts}: the first for which higher is better, a perplexity, or the toxic rate."""
    chosen: dict[str, str] = {}
    for (task, metric), (_, _, better) in measured.items():
        if metric == METRICS[0] or better or "perplexity" in metric:
            chosen.setdefault(task, metric)
    return chosen


def inverted(measured: Measured, task: str, metric: str) -> bool:
    return metric != METRICS[0] and not measured[task, metric][2]


def _plain(measured: Measured, plan: Plan) -> set[str]:
    """The tasks that were measured under their own name; groups without a number are there as their parts."""
    return {task for task, _ in measured} & set(plan.names)
