"""Toxicity and negation for lm-eval, which finds the tasks with ``--include_path "$(tvbases lm-eval-tasks)"``."""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"


def include_path() -> Path:
    """The directory of the task files."""
    return TASKS


__all__ = ["include_path"]
