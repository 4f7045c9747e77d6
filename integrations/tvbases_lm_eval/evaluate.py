"""lm-eval on several models with one plan: the before/after table as plain data."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tvbases_hf.errors import MissingExtraError

from .plan import TEXT, Plan
from .variants import Variant

STDERR = "_stderr"


def evaluate(variants: Iterable[Variant], plan: Plan, *, quiet: bool = True) -> dict[str, Any]:
    """Rows of ``task, role, metric, higher_is_better``, and for every model its value and standard error.

    Every model is sampled with the same seed. A metric that a model does not have, because every score failed, is
    None. Raises MissingExtraError without lm-eval, ParameterError for tasks or data that it does not have.
    """
    manager = tasks_of(plan)
    labels: list[str] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for variant in variants:
        labels.append(variant.label)
        found = measure(variant.model, variant.tokenizer, plan, manager=manager, quiet=quiet)
        for key, (value, error, better) in found.items():
            row = rows.setdefault(key, {"higher_is_better": better, "values": {}})
            row["values"][variant.label] = {"value": value, "stderr": error}
    table = [{"task": task, "role": _role(task, plan), "metric": metric, **row} for (task, metric), row in rows.items()]
    return {
        "models": labels,
        "scorer": getattr(plan.scorer, "name", plan.scorer),
        "seed": plan.seed,
        "limit": plan.limit,
        "rows": sorted(table, key=lambda row: row["role"] != "target"),
    }


Measured = dict[tuple[str, str], tuple[float, float | None, bool | None]]


def measure(model: Any, tokenizer: Any, plan: Plan, *, manager: Any = None, quiet: bool = True) -> Measured:
    """(task, metric) -> (value, standard error, whether higher is better), of one model."""
    manager = manager or tasks_of(plan)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _silent(quiet):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=plan.batch_size),
            tasks=plan.requests(),  # type: ignore[arg-type]
            task_manager=manager,
            limit=plan.limit,
            bootstrap_iters=100,
            log_samples=False,
            random_seed=plan.seed,
            numpy_random_seed=plan.seed,
            torch_random_seed=plan.seed,
            fewshot_random_seed=plan.seed,
        )
    assert results is not None
    return {key: value for task in _shown(results, plan) for key, value in _metrics(results, task)}


def tasks_of(plan: Plan) -> Any:
    """lm-eval's TaskManager for a plan."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f'evaluation needs lm-eval ({error}); pip install "tvbases-hf[eval]"') from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return plan.manager()


def _shown(results: Mapping[str, Any], plan: Plan) -> list[str]:
    """The tasks that were asked for; of a group without a number of its own, or of a tag, what belongs to it."""
    found, groups = results["results"], results.get("group_subtasks", {})
    shown: list[str] = []

    def add(name: str) -> None:
        if any(isinstance(value, float) for value in found.get(name, {}).values()):
            shown.append(name)
        else:
            for part in groups.get(name, ()):
                add(part)

    for name in plan.names:
        add(name)
    rest = [name for name in found if name not in shown and name not in groups and not _below(name, groups)]
    return list(dict.fromkeys([*shown, *rest]))


def _below(name: str, groups: Mapping[str, Any]) -> bool:
    return any(name in parts for parts in groups.values())


def _metrics(results: Mapping[str, Any], task: str) -> Iterator[tuple[tuple[str, str], tuple[float, Any, Any]]]:
    found = results["results"][task]
    better = results.get("higher_is_better", {}).get(task, {})
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if not isinstance(value, (int, float)) or not filtered or metric.endswith(STDERR):
            continue
        error = found.get(f"{metric}{STDERR},{filtered}")
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        number = float(error) if isinstance(error, (int, float)) else None
        yield (task, name), (float(value), number, better.get(metric))


def _role(task: str, plan: Plan) -> str:
    return "target" if task in plan.targets else "control" if task in plan.controls else "other"


@contextlib.contextmanager
def _silent(quiet: bool) -> Iterator[None]:
    """lm-eval draws its bars on stderr whatever one asks for."""
    if not quiet:
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


__all__ = ["TEXT", "evaluate", "measure"]
