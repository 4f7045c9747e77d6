"""Run ``tvbases`` inside this process, and see what a run changed on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import typer.main

from zoo.hf_models import Family

# The commands with their options, which typer would read from their signatures at every call: a tenth of a second.
COMMANDS = functools.cache(typer.main.get_command)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def tvbases(*arguments: object) -> Outcome:
    """What the command prints and its exit code. An exception that it does not turn into a message fails the test."""
    from tvbases_hf.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        patch.object(typer.main, "get_command", COMMANDS),
        patch.object(sys, "argv", ["tvbases", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as done:
            code = done.code
    return Outcome(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())


def snapshot(directory: Path) -> dict[str, str]:
    """Every path below a directory, hidden ones too, with a digest of its contents."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        for path in sorted(directory.rglob("*"))
    }


def refused(workplace: Path, *arguments: object) -> str:
    """The one message of a command that must fail cleanly: exit code 2, no traceback, nothing written anywhere."""
    before = snapshot(workplace)
    outcome = tvbases(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    message = outcome.err.strip()
    assert message.startswith("error: "), message
    assert "\n" not in message, message
    assert "Traceback" not in message
    assert snapshot(workplace) == before
    return message.removeprefix("error: ")


def misused(workplace: Path, *arguments: object) -> str:
    """What is said of wrong usage: one line as of any other wrong value, and where to read more."""
    message = refused(workplace, *arguments)
    assert "; see tvbases" in message and message.endswith(" --help"), message
    return message


def root(place: Family) -> Path:
    return place.base.parent.parent


def inputs(place: Family) -> list[object]:
    """--base and --task for a family."""
    tasks = [part for name, path in place.tasks.items() for part in ("--task", f"{name}={path}")]
    return ["--base", place.base, *tasks]


def compress(place: Family, *more: object) -> list[object]:
    return ["compress", *inputs(place), "--out", root(place) / "basis", *more]
