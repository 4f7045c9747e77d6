"""The errors users see. The command line turns these, and only these, into exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TvbasesError(Exception):
    """Something the user can mend; the message says which item, how many, a sample, and what to do."""


class CheckpointError(TvbasesError):
    """A checkpoint that is missing, damaged, not a checkpoint, or holds NaN or infinity."""


class MismatchError(TvbasesError):
    """Models that cannot be compared: another architecture, other shapes, another vocabulary."""


class ParameterError(TvbasesError, ValueError):
    """A value outside what a method accepts, or a name that no method knows."""


class OutputError(TvbasesError):
    """An output that cannot be written, or that would overwrite something that is not ours."""


class TeamError(TvbasesError):
    """Another process of the same run has stopped."""


class MissingExtraError(TvbasesError, ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""


def first_line(error: BaseException) -> str:
    """What another library says, in one line; where it does not run a model's own code, also what does."""
    text = str(error).strip()
    reason = text.splitlines()[0].rstrip(" .") if text else type(error).__name__
    option = "; --trust-remote-code runs it: read it first" if "trust_remote_code" in text else ""
    return reason + option


def of_system(error: OSError | MemoryError) -> str:
    """What the system refuses, in one line."""
    if isinstance(error, OSError):
        file = f": {error.filename}" if error.filename else ""
        return f"the system refused to read or write{file}: {error.strerror or error}; mend that and run this again"
    return "there is not enough memory; give the command less at a time (--memory, --threads 1), or a larger machine"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`` (did you mean NAME?)`` for a misspelt name, empty if no known one is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
