"""The ``tvbases`` command: parse, call, print. Bad input is one message and exit code 2."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Any

import typer

from ..errors import ParameterError, TvbasesError, of_system
from ..text import printable
from . import (  # noqa: F401  they register their commands
    compress,
    evaluate,
    extract,
    inspect,
    library,
    live,
    merge,
    negate,
    online,
    plan,
    schema,
    styles,
    system,
    tune,
)
from .app import app
from .processes import team

__all__ = ["app", "main"]
# A shell says so of a program that one of these signals has ended; Windows has no name for the first.
SIGPIPE, SIGINT = 13, 2
# Nothing of the modules that a start loads is garbage; looking for it as often as Python does took a tenth of the time.
OBJECTS_BETWEEN_COLLECTIONS = 10_000
# Of click, or of the copy of click that newer typers have inside.
USAGE_ERROR: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point. TvbasesErrors, and what the system refuses, become a message.

    Anything else is a defect of ours and shows its traceback.
    """
    if 0 < gc.get_threshold()[0] < OBJECTS_BETWEEN_COLLECTIONS:
        gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    try:
        with team():
            code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        code = 128 + SIGPIPE
    except (TvbasesError, OSError, MemoryError) as error:
        code = _failed(error)
    sys.exit(code)


def _failed(error: TvbasesError | OSError | MemoryError) -> int:
    said = str(error) if isinstance(error, TvbasesError) else of_system(error)
    with contextlib.suppress(OSError):  # nobody can be told
        print(f"error: {printable(said)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        _discard(sys.stdout)
    return 2


def _discard(stream: Any) -> None:
    """Lose what could not be written, or Python tries again at its end and says so."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _run() -> int:
    """The exit code of the command; wrong usage is a ParameterError, as any other wrong value."""
    try:
        return int(app(prog_name="tvbases", standalone_mode=False) or 0)
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # as click and rich say it, with exit code 1
            raise done.__context__ from None
        raise
    except typer.Abort:
        return 128 + SIGINT
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # `tvbases` alone
            error.show()
            return 2
        context = error.ctx
        where = f"; see {context.command_path} --help" if context else ""
        said = error.format_message().rstrip(".").replace("Value error, ", "")  # of pydantic, which typer asks
        raise ParameterError(said + where) from error
