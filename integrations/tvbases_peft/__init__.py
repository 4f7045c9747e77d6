"""PEFT: a basis on a model, adapters that are loaded as task vectors, and adapters added up exactly."""

from __future__ import annotations

from .basis_hooks import attach, mixed, select
from .combine import add_weighted_adapter
from .files import open_adapter
from .loaded import task_vectors

__all__ = ["add_weighted_adapter", "attach", "mixed", "open_adapter", "select", "task_vectors"]
