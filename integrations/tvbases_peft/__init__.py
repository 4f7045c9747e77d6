"""Adapters that are loaded in a PEFT model: as task vectors, and added up exactly."""

from __future__ import annotations

from .combine import add_weighted_adapter
from .loaded import task_vectors

__all__ = ["add_weighted_adapter", "task_vectors"]
