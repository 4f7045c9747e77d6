"""The scales of styles as they are given: a number by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from ..errors import ParameterError, did_you_mean


def parse_scales(names: tuple[str, ...], scales: Mapping[str, float] | None) -> dict[str, float]:
    """One finite number per style, 1 where none is given. Raises ParameterError for unknown names."""
    given = by_style("scales", {} if scales is None else scales)
    for name, scale in given.items():
        if name not in names:
            near = did_you_mean(name, names)
            raise ParameterError(f'a scale for "{name}", which is no style{near}; there are {", ".join(names)}')
        if not is_number(scale):
            raise ParameterError(f'the scale of "{name}" is {scale!r}; it must be a finite number')
    return {name: float(given.get(name, 1.0)) for name in names}


def by_style(what: str, values: Any) -> dict[str, Any]:
    """ParameterError for what is no dictionary."""
    if not isinstance(values, Mapping):
        raise ParameterError(f'{what} are given by style, for example {{"anime": 0.6}}; got {values!r}')
    return dict(values)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float holds: integers of Python have no end, and numpy has floats of its own."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
