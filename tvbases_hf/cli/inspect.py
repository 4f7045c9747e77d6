"""``tvbases inspect`` and ``tvbases decompose``: what task vectors are like, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .app import app, console
from .options import Base, Json, Quiet, Task, check_json, write_report


@app.command(epilog="Example: tvbases inspect --base llama/ --task math=math/ --task code=code/")
def inspect(
    base: Base,
    task: Task,
    layers: Annotated[bool, typer.Option("--layers", help="Also interference and sharing by layer (slower).")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw everything; implies --layers.", metavar="PNG")] = None,  # noqa: UP045
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """How long and how similar task vectors are, how many bases they need, and whether the base is theirs."""
    from ..gram import gram_matrix
    from ..layers import examine_layers
    from ..report import inspection, print_inspection, warn
    from ..taskvector import TaskVectors, parse_tasks

    check_json(json)
    vectors = TaskVectors.open(base, parse_tasks(task))
    found = inspection(vectors, gram_matrix(vectors, quiet=quiet))
    warn(found["warnings"])
    if layers or plot:
        found["layers"] = vars(examine_layers(vectors, quiet=quiet))
    if plot:
        from ..plots import plot_inspection

        plot_inspection(found, plot)
    if not quiet:
        print_inspection(found, console)
    write_report(json, found)


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
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Split task vectors into what they share and what is unique to each (DeVec), as checkpoints."""
    from ..components import is_components, write_components
    from ..output import check_output
    from ..report import print_components, warn
    from ..shared import Options
    from ..taskvector import TaskVectors, parse_tasks

    options = Options(threshold, subspace, pool, side, rank)
    check_output(out, is_components)
    vectors = TaskVectors.open(base, parse_tasks(task))
    warn(vectors.coverage.notes())
    found = write_components(vectors, options, out, quiet=quiet)
    if not quiet:
        print_components(found, console)
    write_report(json, found)
