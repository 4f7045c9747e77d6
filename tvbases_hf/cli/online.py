"""``tvbases online``: one more task, or several, into a basis of a fixed number of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, console
from .derived import DerivedCommand, given
from .hub import PushToHub
from .options import DryRun, Dtype, ExtraRows, Json, OptionalBase, OptionalTask, Out, Quiet, Revision, parse_dtype, tell


class OnlineCommand(DerivedCommand):
    """A command with the options of all online methods."""

    method_help = (
        "ae and rand_select keep --num-bases vectors; ta, magmax, ties and opcm only the merged one. Default: ae."
    )

    def methods(self) -> Mapping[str, Mapping[str, Any]]:
        from ..basis.online import ONLINE

        return ONLINE


@app.command(
    cls=OnlineCommand,
    epilog="Example: tvbases online --out skills/ --base llama/ --num-bases 4 --task math=math/ --task code=code/",
)
def online(
    context: typer.Context,
    out: Out,
    new: Annotated[
        list[str] | None,
        typer.Argument(help="Fine-tunes to add, each named after the last part of its path.", metavar="[NEW]..."),
    ] = None,
    base: OptionalBase = None,
    task: OptionalTask = None,
    num_bases: Annotated[
        float | None, typer.Option("--num-bases", "-m", help="How many vectors to keep, however many tasks come.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The seed of whatever is drawn at random. Default: 0.")
    ] = None,
    extra_rows: ExtraRows = None,
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
    revision: Revision = None,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Add tasks, one after another, to a basis of fixed size. Each is on disk once it is reported.

    Give --base and the options with the first task; they stay as they are.
    """
    from ..basis.adding import add_tasks
    from ..models.vectors import parse_tasks

    options = given(context)
    tasks = parse_tasks([*(task or ()), *(f"{Path(path).name}={path}" for path in new or ())])
    how: dict[str, Any] = {"dtype": parse_dtype(dtype), "seed": seed, "dry_run": dry_run, "extra_rows": extra_rows}
    tell(add_tasks(out, tasks, base, num_bases, added=_print_added, **how, **options), _print, json)


def _print_added(name: str, basis: Any) -> None:
    held = f"{_count(len(basis.tasks), 'task')} in {_count(len(basis.weights), 'vector')}"
    console.print(f"{name} added: {held} ({basis.settings.method})")


def _print(found: Mapping[str, Any], where: Any) -> None:
    from ..sheet import Sheet
    from ..storage.system import readable_size

    table = Sheet("task", "weight in the merged vector", "error, about", "at most")
    columns = ("tasks", "effective_weights", "task_error_estimate", "task_error_at_most")
    for task, weight, about, most in zip(*(found[name] for name in columns), strict=True):
        table.add_row(task, f"{weight:.3f}", f"{about:.1%}", f"{most:.1%}")
    where.print(table)
    room = found["budget"] - found["num_bases"]
    where.print(
        f"{found['out']}: {_count(found['num_bases'], 'vector')}, {readable_size(found['bytes'])}"
        + (f"; room for {room} more" if room else "; full: the next task compresses it"),
        soft_wrap=True,
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
