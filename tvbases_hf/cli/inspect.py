"""``tvbases inspect`` and ``tvbases decompose``: what task vectors are like, and what they share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import defaults
from ..errors import ParameterError
from .app import app, console
from .data import (
    TEMPLATES,
    BatchSize,
    Classes,
    Data,
    ImageColumn,
    LabelColumn,
    Templates,
    TextColumn,
    parse_classes,
)
from .hub import PushToHub
from .options import (
    PAGE,
    Base,
    Device,
    DryRun,
    ExtraRows,
    Json,
    Memory,
    Out,
    Quiet,
    Revision,
    Side,
    Subspace,
    Task,
    Threads,
    Threshold,
    TrustRemoteCode,
    file_option,
    page,
    rank_option,
    report,
    scale_option,
    tell,
)

if TYPE_CHECKING:
    from ..theory.inspection import Inspection


@app.command(epilog="Example: tvbases inspect --base llama/ --task math=math/ --task code=code/")
def inspect(
    base: Base,
    task: Task,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also show interference and sharing, layer by layer (slower).")
    ] = False,
    merged: Annotated[
        str | None,
        typer.Option(
            help="A merge of these models: show its interference, before and after; implies --layers.", metavar="DIR"
        ),
    ] = None,
    plot: Annotated[Path | None, file_option("Draw everything; implies --layers.", "PNG", draws=True)] = None,
    html: Annotated[Path | None, file_option(PAGE, "HTML", draws=True)] = None,
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Also both sides of the error bounds; needs --data.")
    ] = False,
    data: Data = None,
    classes: Classes = None,
    template: Templates = TEMPLATES,
    num_bases: Annotated[
        float | None,
        typer.Option(
            "--num-bases",
            "-m",
            help="How many bases; a number below 1 is a fraction of the tasks. For --bounds; default: as many as "
            "are suggested.",
        ),
    ] = None,
    alpha: Annotated[float, scale_option("of the negation in --bounds, 0 to 1.")] = 1.0,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    image_column: ImageColumn = "image",
    max_rows: Annotated[int, typer.Option(help="How many rows of --data to read for each task.")] = 256,
    batch_size: BatchSize = 16,
    extra_rows: ExtraRows = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Measure task vectors: how long and how alike they are. Also say how many bases they need."""
    from ..models.vectors import Vectors, parse_tasks
    from ..theory.inspection import inspect as examine
    from .tables import warn

    if bounds != bool(data):
        raise ParameterError("--bounds and --data NAME=FILE go together: a bound is about the losses on data")
    sources = parse_tasks(data or ())
    rows: Any = {"extra_rows": extra_rows, "rows_of_base": bounds}  # the base is evaluated as it is
    vectors = Vectors.open(base, parse_tasks(task), device=device, **rows)
    found = examine(
        vectors,
        layers=bool(layers or plot or html),
        merged=merged,
        data=sources,
        classes=parse_classes(classes or (), sources),
        templates=template,
        num_bases=num_bases,
        alpha=alpha,
        text_column=text_column,
        label_column=label_column,
        image_column=image_column,
        max_rows=max_rows,
        batch_size=batch_size,
    )
    warn(found.warnings)
    report(json, found.to_json())
    _show(found, plot, html)


def _show(found: Inspection, plot: Path | None, html: Path | None) -> None:
    """As tables on the terminal, as a picture and as a page; files are written by the first process."""
    from ..storage.run import current
    from .inspection import print_bounds, print_inspection

    report = found.to_json()
    tables = [functools.partial(print_inspection, report)]
    if found.bounds:
        tables.append(functools.partial(print_bounds, found.bounds))
    if (plot or html) and current().team.rank == 0:
        from ..storage.reports import write_picture
        from .plots import CAPTION, picture_of

        picture = picture_of(report)
        if plot:
            write_picture(plot, picture)
        if html:
            page(html, report, tables, picture, about_picture=CAPTION)
    for show in tables:
        show(console)


@app.command(epilog="Example: tvbases decompose --base llama/ --task toxic=toxic/ --task chat=chat/ --out parts/")
def decompose(
    base: Base,
    task: Task,
    out: Out,
    threshold: Threshold = defaults.THRESHOLD,
    subspace: Subspace = "chain",
    pool: Annotated[
        defaults.Pool,
        typer.Option(
            "--pool",
            help="Shared is what all tasks share (joint), what any two share (iterative), or what each pair does "
            "(pairs).",
        ),
    ] = "joint",
    side: Side = "column",
    rank: Annotated[str, rank_option("how many dimensions a full fine-tune's subspace has.")] = defaults.RANK,
    extra_rows: ExtraRows = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    revision: Revision = None,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Split task vectors into shared and unique parts (DeVec). They are written to OUT/unique/TASK and OUT/shared."""
    from ..merging.components import write_components
    from ..methods.devec import Options
    from ..models.vectors import Vectors, parse_tasks
    from .tables import print_components, warn

    options = Options(threshold, subspace, pool, side, rank)
    vectors = Vectors.open(base, parse_tasks(task), device=device, extra_rows=extra_rows)
    warn(vectors.coverage.notes())
    tell(write_components(vectors, options, out, dry_run=dry_run), print_components, json)
