"""``tvbases inspect`` and ``tvbases decompose``: what task vectors are like, and what they share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import ParameterError
from .app import app, console
from .options import Base, Device, Json, Quiet, Task, check_file, check_json, write_report


@app.command(epilog="Example: tvbases inspect --base llama/ --task math=math/ --task code=code/")
def inspect(
    base: Base,
    task: Task,
    layers: Annotated[bool, typer.Option("--layers", help="Also interference and sharing by layer (slower).")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw everything; implies --layers.", metavar="PNG")] = None,  # noqa: UP045
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="All of it on one page, pictures too; implies --layers.", metavar="FILE"),
    ] = None,
    bounds: Annotated[bool, typer.Option("--bounds", help="Also the error bounds, both sides; needs --data.")] = False,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Data of a task: .jsonl, .json, .csv, or DATASET[:SPLIT]; repeat.", metavar="NAME=FILE_OR_ID"
        ),
    ] = None,
    num_bases: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--num-bases", "-m", help="--bounds: how many bases; left out: as many as are suggested."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="--bounds: of the negation, 0 to 1.")] = 1.0,
    text_column: Annotated[str, typer.Option(help="--data: the column of text.")] = "text",
    label_column: Annotated[str, typer.Option(help="--data: the column of labels, for classifiers.")] = "label",
    max_rows: Annotated[int, typer.Option(help="--data: rows to read of each task.")] = 256,
    batch_size: Annotated[int, typer.Option(help="--data: rows a batch.")] = 16,
    device: Device = "cpu",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """How long and how similar task vectors are, how many bases they need, and whether the base is theirs."""
    from ..bases.weights import resolve_num_bases
    from ..models.gram import gram_matrix
    from ..models.layers import examine_layers
    from ..models.vectors import Vectors, parse_tasks
    from ..storage.run import find_device
    from .tables import inspection, warn

    check_json(json)
    check_file(plot, "--plot")
    check_file(html, "--html")
    if bounds != bool(data):
        raise ParameterError("--bounds and --data NAME=FILE go together: a bound is about the losses on data")
    place = find_device(device)
    if bounds and place.type != "cpu":
        raise ParameterError("--bounds are computed on the CPU; leave --device out")
    vectors = Vectors.open(base, parse_tasks(task), device=place)
    loaded, losses = _prepare(vectors.base, data or [], text_column, label_column, max_rows, batch_size)
    gram = gram_matrix(vectors)
    found = inspection(vectors, gram)
    warn(found["warnings"])
    measured = None
    if losses:
        from ..theory.bounds import measure_bounds

        count = resolve_num_bases(found["suggested_num_bases"] if num_bases is None else num_bases, len(vectors))
        measured = measure_bounds(loaded, vectors, losses, count, gram=gram, alpha=alpha)
        found["bounds"] = measured.to_json()
    if layers or plot or html:
        found["layers"] = vars(examine_layers(vectors))
    _show(found, measured, plot, html, quiet)
    write_report(json, found)


def _prepare(base: Any, data: list[str], *columns: Any) -> tuple[Any, dict[str, Any]]:
    """The base with its head, and the losses of the data that was given; nothing if none was."""
    if not data:
        return None, {}
    from ..learning.taskfiles import Columns, TaskModel
    from ..models.vectors import parse_tasks
    from ..theory.hessian import cross_entropy

    read, sources = Columns(*columns), parse_tasks(data)
    loaded = TaskModel.load(base)
    return loaded.model, {name: cross_entropy(loaded.data(name, source, read)) for name, source in sources.items()}


def _show(found: dict[str, Any], measured: Any, plot: Path | None, html: Path | None, quiet: bool) -> None:
    """As tables on the terminal, as a picture and as a page; files are written by the first process."""
    from ..storage.run import current
    from .tables import print_inspection

    tables = [functools.partial(print_inspection, found)]
    if measured:
        from .bounds_table import print_bounds

        tables.append(functools.partial(print_bounds, measured))
    if (plot or html) and current().team.rank == 0:
        from ..storage.output import writing
        from .page import write_page
        from .plots import picture_of

        picture = picture_of(found)
        if plot:
            with writing(plot):
                plot.write_bytes(picture)
        if html:
            write_page(found, tables, picture, html)
    if not quiet:
        for show in tables:
            show(console)


@app.command(epilog="Example: tvbases decompose --base llama/ --task toxic=toxic/ --task chat=chat/ --out parts/")
def decompose(
    base: Base,
    task: Task,
    out: Annotated[Path, typer.Option("--out", help="Where to write unique/TASK and shared.", metavar="DIR")],
    threshold: Annotated[
        float, typer.Option(help="Degree of sharing, 0 to 1, above which a direction is shared.")
    ] = 0.85,
    subspace: Annotated[
        str, typer.Option(help="chain (the paper's), mean (order-free) or angles (two tasks).")
    ] = "chain",
    pool: Annotated[str, typer.Option(help="joint, iterative or pairs.")] = "joint",
    side: Annotated[str, typer.Option(help="column (output directions) or row (input directions).")] = "column",
    rank: Annotated[
        str, typer.Option(help="Dimensions of a task's subspace: energy:0.95, 0.25, 16, ...")
    ] = "energy:0.95",
    device: Device = "cpu",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Split task vectors into what they share and what is unique to each (DeVec), as checkpoints."""
    from ..merging.components import is_components, write_components
    from ..methods.devec import Options
    from ..models.vectors import Vectors, parse_tasks
    from ..storage.output import check_output
    from ..storage.run import find_device
    from .tables import print_components, warn

    options = Options(threshold, subspace, pool, side, rank)
    check_output(out, is_components)
    vectors = Vectors.open(base, parse_tasks(task), device=find_device(device))
    warn(vectors.coverage.notes())
    found = write_components(vectors, options, out)
    if not quiet:
        print_components(found, console)
    write_report(json, found)
