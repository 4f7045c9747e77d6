"""What is worth saying of the adapters that a library is made of, or that come into it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Set

from ..info import BasisInfo

# Two adapters are the same where their squared norms are: these are sums of as many numbers as the adapters have.
SAME_NORM = 1e-9


def notes(info: BasisInfo, new: Set[str]) -> list[str]:
    """Of the ``new`` tasks: those that change nothing, and those that are there under another name."""
    assert info.library is not None
    norms = {task: member.square_norm for task, member in zip(info.tasks, info.library.members, strict=True)}
    zero = [task for task in info.tasks if task in new and not norms[task]]
    found = [f"{len(zero)} of the adapters change nothing (first: {zero[0]})"] if zero else []
    ordered = sorted((task for task in info.tasks if norms[task]), key=lambda task: norms[task])
    for one, other in itertools.pairwise(ordered):
        if math.isclose(norms[one], norms[other], rel_tol=SAME_NORM) and not new.isdisjoint((one, other)):
            first, again = sorted((one, other), key=info.tasks.index)
            found.append(f'"{again}" seems to be the same adapter as "{first}"; leave one of them out')
    return found


def few(lines: list[str], most: int = 20) -> list[str]:
    """The first of many warnings, and how many more there are."""
    lines = list(dict.fromkeys(lines))
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} warnings more of this kind"]
