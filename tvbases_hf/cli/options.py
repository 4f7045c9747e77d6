"""Options that several commands have, and what is checked before the work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import OutputError, ParameterError

Base = Annotated[
    str, typer.Option("--base", help="The pretrained model: a directory or a Hub id.", metavar="PATH_OR_ID")
]
Task = Annotated[
    list[str], typer.Option("--task", help="A fine-tuned model; repeat for each.", metavar="NAME=PATH_OR_ID")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no report.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="Write the report as JSON.", metavar="FILE")]  # noqa: UP045
NumBases = Annotated[
    float, typer.Option("--num-bases", "-m", help="How many bases; a number below 1 is a fraction of the tasks.")
]


def parse_dtype(name: str) -> Any:
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check_choice("--dtype", name, known)
    return known[name]


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ParameterError(f"{option}: {value!r} is unknown; choose one of {', '.join(known)}")


def check_json(file: Path | None) -> None:
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise OutputError(f'--json "{file}": not a file in a directory that exists')


def write_report(file: Path | None, value: dict[str, Any]) -> None:
    from ..output import write_json, writing

    if file is not None:
        with writing(file):
            write_json(file, value)
