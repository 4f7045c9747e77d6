"""Toxicity and negation for lm-eval, which finds the tasks with ``--include_path "$(tvbases lm-eval-tasks)"``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .folder import include_path

if TYPE_CHECKING:
    from .evaluate import evaluate_model
    from .forget import negate_task
    from .plan import Plan
    from .tune import tune_merge

_HOME = {"Plan": "plan", "evaluate_model": "evaluate", "negate_task": "forget", "tune_merge": "tune"}

__all__ = ["Plan", "evaluate_model", "include_path", "negate_task", "tune_merge"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
