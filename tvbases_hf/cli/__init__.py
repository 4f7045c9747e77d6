"""The ``tvbases`` command: parse, call, print. Bad input is one message and exit code 2."""

from __future__ import annotations

import sys

from ..errors import TvbasesError
from . import compress, evaluate, extract, inspect, merge, negate, online, plan, schema, styles, system  # noqa: F401  they register their commands
from .app import app
from .processes import team

__all__ = ["app", "main"]


def main() -> None:
    """Entry point. Only TvbasesError becomes a message; anything else is a defect of ours and shows its traceback."""
    try:
        with team():
            app()
    except TvbasesError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
