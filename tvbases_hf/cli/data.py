"""Options of the commands that measure models on data, and what they say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import typer

from .. import defaults
from ..errors import ParameterError

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Data of a task: a folder of images by class, .npz, .jsonl, .json, .csv, or DATASET[:SPLIT] of the Hub; "
        "repeat.",
        metavar="NAME=PATH_OR_ID",
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--classes",
        help="--data: a file of the names of the classes, one a line in the order of the labels; repeat.",
        metavar="[NAME=]FILE",
    ),
]
Templates = Annotated[
    list[str],
    typer.Option(
        "--template", help="--classes: what a model of images and texts is given of every name; repeat.", metavar="TEXT"
    ),
]
TextColumn = Annotated[str, typer.Option(help="--data: the column of text.")]
LabelColumn = Annotated[str, typer.Option(help="--data: the column of labels, or of the texts to write.")]
ImageColumn = Annotated[str, typer.Option(help="--data: the column of images.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Texts at a time, or images; samples depend on it.")]
TEMPLATES = [defaults.TEMPLATE]


def parse_classes(items: Iterable[str], data: Mapping[str, str]) -> dict[str, str]:
    """``[NAME=]FILE`` arguments by the name of the data, "" for all others; ParameterError for a repeated one."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, file = item.partition("=")
        name, file = (name, file) if equals and (name in data or "/" not in name) else ("", item)
        if name in found:
            raise ParameterError(f"two files of --classes {f'of {name}' if name else 'of all data'}; give one")
        found[name] = file
    return found
