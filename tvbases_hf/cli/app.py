"""The application that every command registers with, and where all of them print."""

from typing import Annotated

import typer

from tvbases_mergekit.hook import hook_app

from ..text import Terminal
from ..version import library_version

app = typer.Typer(
    help="Task-vector bases: compress, merge and edit fine-tuned models.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help takes as long to load as all the rest of `tvbases --help`
    pretty_exceptions_enable=False,
)
app.add_typer(hook_app, name="hook")
# All that commands print goes through it, as text. Silent while a command with --quiet runs.
console = Terminal()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tvbases {library_version()}")
        raise typer.Exit


@app.callback(help="Task-vector bases: compress, merge and edit fine-tuned models.")
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...
