"""Regular expressions that come with a model, matched as Python's ``re`` does it, but not for ever.

``re`` cannot be stopped, and some expressions of a few characters take it longer than the age of the universe.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import regex

# Of one expression; a list of all modules of a large model, as one expression, is well below it.
LONGEST = 100_000
# Seconds that all matching with the expressions of one file may take; a model's modules take a few milliseconds.
PATIENCE = 10.0
TRIAL = "import json, re, sys; ps, ns = json.load(sys.stdin); [re.fullmatch(p, n) for p in ps for n in ns]"


class PatternError(ValueError):
    """An expression that is none, is too long, or takes too long."""


@dataclass
class Patience:
    """What is left of the time for all expressions of one file."""

    left: float = field(default=PATIENCE)

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether the expression is that of the whole name. Raises PatternError."""
        return self._found(_compiled(pattern).fullmatch, pattern, name) is not None

    def match(self, pattern: str, name: str) -> bool:
        """Whether the name begins as the expression says. Raises PatternError."""
        return self._found(_compiled(pattern).match, pattern, name) is not None

    def groups(self, pattern: str, name: str) -> tuple[str | None, ...] | None:
        """What the expression's groups are where the name begins as it says; else None. Raises PatternError."""
        found = self._found(_compiled(pattern).match, pattern, name)
        return None if found is None else found.groups()

    def _found(
        self, search: Callable[..., regex.Match[str] | None], pattern: str, name: str
    ) -> regex.Match[str] | None:
        begun = time.monotonic()
        try:
            found = search(name, timeout=max(self.left, 0.001))
        except TimeoutError:
            raise PatternError(
                f"{_shown(pattern)} takes more than {PATIENCE:g} s to match the names of modules (last: "
                f"{_shown(name)}); write a simpler expression, or a list of names"
            ) from None
        self.left -= time.monotonic() - begun
        return found


def check_time(patterns: Iterable[str], names: Iterable[str], seconds: float = PATIENCE) -> None:
    """PatternError where Python's own engine, which a host is going to use, takes longer for these.

    It is tried in a process of its own, which can be ended.
    """
    listed = list(patterns)
    try:
        given = json.dumps([listed, list(names)]).encode()
        subprocess.run(
            [sys.executable, "-I", "-c", TRIAL], input=given, timeout=seconds, check=True, capture_output=True
        )
    except subprocess.TimeoutExpired:
        raise PatternError(
            f"{', '.join(map(_shown, listed[:3]))}: takes more than {seconds:g} s to match the names of modules; write "
            "a simpler expression, or a list of names"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise PatternError(f"{', '.join(map(_shown, listed[:3]))}: {''.join(reason)}") from error


def check_pattern(pattern: str) -> str:
    """The expression; PatternError for one that Python's ``re`` does not take."""
    _compiled(pattern)
    return pattern


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > LONGEST:
        raise PatternError(f"a regular expression of {len(pattern)} characters, more than {LONGEST}")
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PatternError(f"{_shown(pattern)} is not a regular expression: {reason}") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
