"""The application that every command registers with, and where all of them print."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tvbases_mergekit.hook import hook_app

from ..text import Terminal
from ..version import library_version

# In the meta of a command's context: what its --json, --plot and --html were before it ran, and whether it is silent.
SIDE_FILES, QUIET = "tvbases.side_files", "tvbases.quiet"


class Program(TyperGroup):
    """After a command that succeeded it names the pictures, pages and reports that were written beside the output."""

    def invoke(self, ctx: Any) -> Any:
        done = super().invoke(ctx)
        before = ctx.meta.get(SIDE_FILES, {})
        written = [str(file) for file, was in before.items() if stamp(file) not in (None, was)]
        if written and not ctx.meta.get(QUIET):
            console.print(f"written: {', '.join(written)}", highlight=False, soft_wrap=True)
        return done


def stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written; None where there is none, or a pipe."""
    file = Path(os.path.expanduser(file))  # of a user that does not exist: refused where it is written
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.is_file() else None


app = typer.Typer(
    cls=Program,
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
