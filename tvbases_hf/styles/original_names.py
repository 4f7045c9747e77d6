from __future__ import annotations

import functools

from .families import Modules


@functools.cache
def original_modules(family: str) -> Modules | None:
    return None
