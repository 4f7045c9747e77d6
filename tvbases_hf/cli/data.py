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
        help="A task's data: a folder of images by class, .npz, .jsonl, .json, .csv, or DATASET[:SPLIT] on the Hub; "
        "repeat.",
        metavar="NAME=PATH_OR_ID",
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--classes",
        help="A file with the names of --data's classes, one per line, in the order of the labels; repeat.",
        metavar="[NAME=]FILE",
    ),
]
Templates = Annotated[
    list[str],
    typer.Option(
        "--template", help="The text that a model of images and texts is given for each class; repeat.", metavar="TEXT"
    ),
]
TextColumn = Annotated[str, typer.Option(help="The column of --data that holds the text.")]
LabelColumn = Annotated[str, typer.Option(help="The column of --data that holds the labels, or the texts to write.")]
ImageColumn = Annotated[str, typer.Option(help="The column of --data that holds the images.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="How many texts or images at a time; sampled texts depend on it.")
]
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
