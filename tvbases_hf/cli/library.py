"""``tvbases library``: many adapters in one directory, one by one in and out of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
from .hub import PushToHub
from .options import (
    Base,
    DrawnHtml,
    DryRun,
    EqualRank,
    Host,
    Json,
    OptionalBase,
    OptionalTask,
    Out,
    Quiet,
    Revision,
    Task,
    file_option,
    page,
    rank_option,
    scale_option,
    tell,
)

if TYPE_CHECKING:
    from ..sheet import Sheet

library_app = typer.Typer(
    help="Keep many adapters in one directory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(library_app, name="library")
# Of the task's norm: less is not worth a word.
LEAST_CUT = 5e-3
Directory = Annotated[Path, typer.Argument(help="The library.", metavar="DIR")]


@library_app.command(epilog="Example: tvbases library add skills/ --base llama/ --task math=math-lora/")
def add(
    directory: Directory,
    base: Base,
    task: Task,
    budget: Annotated[
        float | None,
        typer.Option(help="For a new library: share of the adapters' bytes to keep. Default: 0.5."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let the new task take the place of one with the same name.")
    ] = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Add adapters to a library, or start one. The tasks that are already there do not change."""
    from ..basis.libraries import add as run
    from ..models.vectors import parse_tasks

    tell(run(directory, base, parse_tasks(task), budget=budget, replace=replace, dry_run=dry_run), _print_change, json)


@library_app.command(epilog="Example: tvbases library remove skills/ math")
def remove(
    directory: Directory,
    name: Annotated[list[str], typer.Argument(help="The tasks to take out.", metavar="NAME...")],
    dry_run: DryRun = False,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Take tasks out of a library. Those that stay do not change."""
    from ..basis.libraries import remove as run

    tell(run(directory, name, dry_run=dry_run), _print_change, json)


@library_app.command("list", epilog="Example: tvbases library list skills/")
def show(directory: Directory, quiet: Quiet = False, json: Json = None) -> None:
    """List the tasks of a library. For each, how large it is and how far it is from its adapter."""
    from ..basis.libraries import listed

    tell(listed(directory), _print_list, json)


@library_app.command(epilog="Example: tvbases library export skills/ math --out math-lora/")
def export(
    directory: Directory,
    name: Annotated[str, typer.Argument(help="The task.", metavar="NAME")],
    out: Out,
    alpha: Annotated[float, scale_option("how much of the task the adapter holds.")] = 1.0,
    rank: Annotated[str | None, rank_option("of every module; default: what the task has.")] = None,
    equal_rank: EqualRank = False,
    host: Host = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Write one task as a LoRA of its own. Any basis of adapters will do."""
    from ..basis.libraries import export as run

    how: dict[str, Any] = {"rank": rank, "equal_rank": equal_rank, "host": host}
    tell(run(directory, name, out, alpha=alpha, dry_run=dry_run, **how), _print_export, json)


@library_app.command(epilog="Example: tvbases library verify skills/")
def verify(
    directory: Directory,
    base: OptionalBase = None,
    task: OptionalTask = None,
    revision: Revision = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Check a library against its checksums. With --task, also compare tasks with their adapters."""
    from ..basis.libraries import verify as run
    from ..models.vectors import parse_tasks

    tell(run(directory, base, parse_tasks(task or ())), _print_verified, json)


@library_app.command(epilog="Example: tvbases library inspect skills/ --html skills.html")
def inspect(
    directory: Directory,
    plot: Annotated[Path | None, file_option("Draw the curve of error and bytes.", "PNG", draws=True)] = None,
    html: DrawnHtml = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Show what is in a library. Near copies, what clusters share, and what each byte buys."""
    from ..basis.libraries import inspect as run

    found = run(directory)
    if plot or html:
        from ..storage.reports import write_picture
        from .plots import LIBRARY_CAPTION, library_picture

        picture, title = library_picture(found), f"{len(found['tasks'])} adapters in {found['out']}"
        if plot:
            write_picture(plot, picture)
        if html:
            shows = [functools.partial(show, found) for show in (_print_inspection, _print_tasks)]
            page(html, found, shows, picture, title=title, about_picture=LIBRARY_CAPTION)
    tell(found, _print_inspection, json)


@library_app.command("import", epilog="Example: tvbases library import shared/ --out loras/")
def convert(
    source: Annotated[
        Path, typer.Argument(help="A directory of vlora-dev, lorashare or TaskVectorBasis.", metavar="DIR")
    ],
    out: Out,
    base: OptionalBase = None,
    dry_run: DryRun = False,
    revision: Revision = None,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Write another program's tasks as LoRAs. Full task vectors become checkpoints, with --base."""
    from ..basis.libraries import convert as run

    tell(run(source, out, base, dry_run=dry_run), _print_converted, json)


def _print_converted(found: Mapping[str, Any], where: Any) -> None:
    where.print(f"{found['out']}: {len(found['tasks'])} tasks, the first {found['tasks'][0]}", soft_wrap=True)


def _print_change(found: Mapping[str, Any], where: Any) -> None:
    from .tables import print_library

    for word in ("added", "removed"):
        for task in found.get(word, ()):
            error = (
                f", {found['task_error'][found['tasks'].index(task)]:.1%} from its adapter" if word == "added" else ""
            )
            where.print(f"{task} {word}{error}")
    print_library(found, where)


def _print_list(found: Mapping[str, Any], where: Any) -> None:
    _print_tasks(found, where)
    _print_change(found, where)


def _print_tasks(found: Mapping[str, Any], where: Any) -> None:
    from ..sheet import Sheet
    from ..storage.system import readable_size

    about = "what each adds to the library, and how far what comes back is from the adapter (norm of the difference)"
    table = Sheet("task", "cluster", "bytes", "error", title="tasks", about=about)
    for task, cluster, size, error in zip(
        found["tasks"], found["task_cluster"], found["task_bytes"], found["task_error"], strict=True
    ):
        table.add_row(task, str(cluster) if cluster >= 0 else "-", readable_size(size), f"{error:.1%}")
    where.print(table)


def _print_export(found: Mapping[str, Any], where: Any) -> None:
    from ..storage.system import readable_size

    size, error = readable_size(found["bytes"]), found["task_error"]
    cut = f", and its rank leaves out {found['cut']:.1%}" if found["cut"] > LEAST_CUT else ""
    where.print(f"{found['out']}: {found['task']}, {size}, {error:.1%} off{cut}", soft_wrap=True)
    for line in found["loading"]:
        where.print(line)


def _print_verified(found: Mapping[str, Any], where: Any) -> None:
    read = f"{found['files']} files are what was written; {len(found['tasks'])} tasks were read"
    where.print(f"{found['out']}: {read}", soft_wrap=True)
    for task, error in found["measured"].items():
        where.print(f"{task}: {error:.2%} from its adapter, as recorded")


def _print_inspection(found: Mapping[str, Any], where: Any) -> None:
    for table in (_clusters(found), _near_copies(found), _curve(found)):
        if table.row_count:
            where.print(table)
    _print_change(found, where)


def _clusters(found: Mapping[str, Any]) -> Sheet:
    from ..sheet import Sheet

    about = "tasks that use the same directions; of these, how many are stored per weight, in how many bits a number"
    headings = ("cluster", "tasks", "output directions", "input directions", "bits")
    table = Sheet(*headings, title="what clusters share", about=about)
    for place, (members, shared) in enumerate(zip(found["cluster_members"], found["shared_directions"], strict=True)):
        sizes = (f"{shared[word]:.1f}" for word in ("outputs", "inputs", "bits"))
        table.add_row(str(place), str(len(members)), *sizes)
    return table


def _near_copies(found: Mapping[str, Any]) -> Sheet:
    from ..sheet import Sheet

    about = "pairs whose changes point the same way, by the cosine over some weights: one of each can go"
    table = Sheet("task", "copy", "cosine", title="near copies", about=about, names=2)
    for pair in found["near_copies"]:
        table.add_row(*pair["tasks"], f"{pair['cosine']:.3f}")
    return table


def _curve(found: Mapping[str, Any]) -> Sheet:
    """With the point that was chosen, as it is stored."""
    from ..sheet import Sheet
    from ..storage.system import readable_size

    rows = [(row["bytes"], row["error"], "planned") for row in found["curve"]]
    rows.append((found["bytes"], found["mean_square_error"] ** 0.5, "stored"))
    about = "the root mean square error of all tasks at other sizes, as they were planned when the library began"
    table = Sheet("", "bytes", "share", "error", title="what a byte buys", about=about)
    for size, error, what in sorted(rows):
        table.add_row(what, readable_size(size), f"{size / found['bytes_of_task_vectors']:.1%}", f"{error:.2%}")
    return table
