"""Options that several commands have, and what is checked before the work."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer

from ..errors import OutputError, ParameterError


def _quietly(context: typer.Context, quiet: bool) -> bool:
    """The command's work is without bars; only then is anything imported that is not needed to parse."""
    if quiet:
        from ..storage.run import current, using

        context.with_resource(using(replace(current(), quiet=True)))
    return quiet


_BASE = typer.Option("--base", help="The pretrained model: a directory or a Hub id.", metavar="PATH_OR_ID")
_TASK = typer.Option("--task", help="A fine-tuned model; repeat for each.", metavar="NAME=PATH_OR_ID")
Base = Annotated[str, _BASE]
Task = Annotated[list[str], _TASK]
Value = TypeVar("Value")
# Of commands that can do without in some of their uses; see ``required``.
OptionalBase = Annotated[Optional[str], _BASE]  # noqa: UP045
OptionalTask = Annotated[Optional[list[str]], _TASK]  # noqa: UP045
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no report.", callback=_quietly)]
Json = Annotated[Optional[Path], typer.Option("--json", help="Write the report as JSON.", metavar="FILE")]  # noqa: UP045
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", help="Weights that are worked on at a time; left out: one per processor.", min=1),
]
Memory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--memory", help="What the work may take in memory beside the program, for example 1.5GB."),
]
Device = Annotated[
    str, typer.Option(help="Where changes are computed: cpu, cuda (of several processes each takes one), cuda:1.")
]
Resume = Annotated[
    bool, typer.Option(help="Go on where a killed or interrupted run of this very command was, if there is one.")
]
NumBases = Annotated[
    float, typer.Option("--num-bases", "-m", help="How many bases; a number below 1 is a fraction of the tasks.")
]


def required(option: str, value: Value | None) -> Value:
    """The value of an option that this use of a command needs; a usage message if it is missing."""
    if not value:
        raise typer.BadParameter("this option is missing", param_hint=f"'{option}'")
    return value


def parse_targets(items: Sequence[str], tasks: Iterable[str]) -> list[float] | None:
    """``NAME=NUMBER`` arguments as one number per task, 1 where none is given; None without any."""
    found = dict.fromkeys(tasks, 1.0)
    for item in items:
        name, _, number = item.partition("=")
        try:
            found[name] = float(number) if name in found else found[name]
        except (KeyError, ValueError):
            raise ParameterError(
                f'--target "{item}" is not NAME=NUMBER of one of the tasks ({", ".join(found)})'
            ) from None
    return list(found.values()) if items else None


def parse_dtype(name: str) -> Any:
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check_choice("--dtype", name, known)
    return known[name]


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ParameterError(f"{option}: {value!r} is unknown; choose one of {', '.join(known)}")


def check_json(file: Path | None) -> None:
    check_file(file, "--json")


def check_file(file: Path | None, option: str) -> None:
    """Before any work: OutputError for a file that could not be written after it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise OutputError(f'{option} "{file}": not a file in a directory that exists')


@contextlib.contextmanager
def resources(threads: int | None, memory: str | None, resume: bool) -> Iterator[None]:
    """The block works with these, and with the other processes of this run if there are any."""
    from ..storage.run import current, using

    run = current()
    limit = run.memory if memory is None else parse_size(memory)
    with using(replace(run, workers=threads or run.workers, memory=limit, resume=resume)):
        yield


def parse_size(text: str | None, option: str = "--memory") -> int | None:
    """``1.5GB`` in bytes; ParameterError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)i?B?\s*", text)
    try:
        size = float(found[1]) * 1000 ** "_KMGT".index(found[2].upper() or "_") if found else 0.0
    except ValueError:
        size = 0.0
    if size <= 0:
        raise ParameterError(f"{option}: {text!r} is no size; for example 800MB, or 1.5GB")
    return int(size)


def write_report(file: Path | None, value: dict[str, Any]) -> None:
    from ..storage.output import write_json, writing
    from ..storage.run import current

    if file is not None and current().team.rank == 0:
        with writing(file):
            write_json(file, value)
