"""lm-eval, and data of one's own, on several models with one plan: the before/after table as plain data."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError
from tvbases_hf.learning.data import TaskData, decodes, kind_of, writes
from tvbases_hf.learning.rows import Rows, read_rows
from tvbases_hf.learning.taskfiles import TaskModel
from tvbases_hf.storage.run import current

from .plan import Plan
from .variants import Variant, Where, variants

STDERR = "_stderr"

Measured = dict[tuple[str, str], tuple[float, float | None, bool | None]]
"""(task, metric) -> value, standard error, whether higher is better."""


@dataclass(frozen=True)
class Session:
    """A plan with its data and its scorer loaded, once for all the models that are measured with it.

    ``loaded`` are lm-eval's tasks, ``rows`` the data by name.
    """

    plan: Plan
    loaded: Mapping[str, Any]
    rows: Mapping[str, Rows]

    @classmethod
    def open(cls, plan: Plan) -> Session:
        """Load the tasks. Raises MissingExtraError without lm-eval, ParameterError for unknown tasks or bad data."""
        reading = plan.reading()
        rows = {name: read_rows(name, source, reading.max_rows) for name, source in plan.data.items()}
        return cls(plan, _benchmarks(plan) if plan.benchmarks else {}, rows)

    def data(self, variant: Variant) -> tuple[list[TaskData], list[str]]:
        """The data as a model is given it, and what a user should know of that."""
        if self.loaded and variant.tokenizer is None:
            raise ParameterError(
                f'"{self.plan.benchmarks[0]}" is not --data, and lm-eval\'s tasks ask models that write text; a '
                f"{kind_of(variant.model)} is measured on --data NAME=FILE_OR_FOLDER"
            )
        if self.loaded and decodes(variant.model):
            raise CheckpointError(
                f'"{variant.label}" is an encoder with a decoder ({variant.model.config.model_type}), and lm-eval '
                "tasks are measured of causal language models here; give its task's data with --data NAME=FILE"
            )
        asked, reading = TaskModel(variant.model, variant.directories), self.plan.reading()
        return [asked.data(name, rows, reading) for name, rows in self.rows.items()], asked.notes()

    def measure(self, model: Any, tokenizer: Any, data: Sequence[TaskData] = ()) -> Measured:
        """All metrics of one model, on ``data`` of it or of its base; every model starts from the plan's seed."""
        found: Measured = {}
        for task in data:
            answers = task.answers(model)
            error = None if writes(model) else answers.accuracy_error  # tokens of one text are not independent
            found[task.name, "accuracy"] = answers.accuracy, error, True
            found[task.name, "loss"] = answers.loss, None, False
        return found | (self._benchmarks(model, tokenizer) if self.loaded else {})

    def _benchmarks(self, model: Any, tokenizer: Any) -> Measured:
        import numpy as np
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        plan = self.plan
        random.seed(plan.seed)
        np.random.seed(plan.seed)
        torch.manual_seed(plan.seed)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=plan.seed)
        wrapper: Any = HFLM  # its decorator hides the constructor from type checkers
        with _silent():
            asked = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=plan.batch_size)
            if asked.max_length < 1:  # XLNet's configuration says -1: as long as one likes
                asked._max_length = asked._DEFAULT_MAX_LENGTH
            results = evaluate(
                asked,
                dict(self.loaded),  # type: ignore[arg-type]
                limit=plan.limit,
                bootstrap_iters=100,
                log_samples=False,
            )
        assert results is not None
        return {key: value for task in _shown(results, plan) for key, value in _metrics(results, task)}


def _benchmarks(plan: Plan) -> Mapping[str, Any]:
    """lm-eval's tasks of a plan."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f'evaluation needs lm-eval ({error}); pip install "tvbases-hf[eval]"') from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _silent():
        loaded = plan.manager().load(plan.requests())
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def evaluate_model(
    model: str,
    plan: Plan,
    *,
    base: str | None = None,
    tasks: Sequence[str] | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The base before, and a checkpoint, an adapter, or each task of a basis after, by path or Hub id.

    Args:
        base: None: what the model names; a checkpoint is then evaluated alone.
        tasks: of a basis; None for all of them.
        device: None: a GPU if there is one; ``auto`` spreads a model over all GPUs.

    Returns the table of ``evaluate``, and raises as it and ``variants`` do.
    """
    return evaluate(variants(model, base, tasks, Where(device, dtype)), plan)


def evaluate(models: Iterable[Variant], plan: Plan) -> dict[str, Any]:
    """Rows of ``task, role, metric, higher_is_better``, and for every model its value and standard error.

    A metric that a model does not have, because every score failed, is absent from ``values``. Raises as Session.open.
    """
    session = Session.open(plan)
    labels: list[str] = []
    notes: list[str] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for variant in models:
        label = _column(variant.label, labels)
        labels.append(label)
        data, said = session.data(variant)
        notes += said
        found = session.measure(variant.model, variant.tokenizer, data)
        for key, (value, error, better) in found.items():
            row = rows.setdefault(key, {"higher_is_better": better, "values": {}})
            row["values"][label] = {"value": value, "stderr": error}
    table = [{"task": task, "role": _role(task, plan), "metric": metric, **row} for (task, metric), row in rows.items()]
    return {
        "models": labels,
        "notes": list(dict.fromkeys(notes)),
        "scorer": getattr(plan.scorer, "name", plan.scorer) if plan.benchmarks else None,
        "seed": plan.seed,
        "limit": plan.limit,
        "rows": sorted(table, key=lambda row: row["role"] != "target"),
    }


def _column(label: str, taken: Sequence[str]) -> str:
    """The label, or one with a number: a model may be called "before", as the base's column is."""
    named, number = label, 2
    while named in taken:
        named, number = f"{label} ({number})", number + 1
    return named


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
    inside = {part for parts in groups.values() for part in parts}
    rest = [name for name in found if name not in groups and name not in inside]
    return list(dict.fromkeys([*shown, *rest]))


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
    if task in plan.targets or task in plan.controls:
        return "target" if task in plan.targets else "control"
    return "data" if task in plan.data else "other"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """lm-eval and datasets draw their bars on stderr whatever one asks for."""
    if not current().quiet:
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield
