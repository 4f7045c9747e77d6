"""The application that every command registers with."""

import typer
from rich.console import Console

from tvbases_mergekit.hook import hook_app

app = typer.Typer(
    help="Task-vector bases: compress, merge and edit fine-tuned models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(hook_app, name="hook")
console = Console()
