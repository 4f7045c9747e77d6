"""vLLM: a LoRA resolver that gives a server the tasks of a basis by name, each written when it is asked for."""

from __future__ import annotations

from .cache import AdapterCache
from .plugin import register
from .resolver import make_resolver

__all__ = ["AdapterCache", "make_resolver", "register"]
