"""``tvbases plan``: what a job will cost, before it is begun."""

from __future__ import annotations

import contextlib
from typing import Annotated, Optional

import typer

from .app import app, console
from .options import Base, Json, NumBases, Quiet, Threads, check_json, parse_dtype, parse_size, write_report


@app.command(epilog="Example: tvbases plan --base meta-llama/Llama-3.1-8B --models 8 --job ae_bases --bandwidth 2GB")
def plan(
    base: Base,
    models: Annotated[int, typer.Option(help="How many full fine-tunes of the base.", min=1)],
    job: Annotated[
        str,
        typer.Option(help="gram, compress, or a merge: linear, task_arithmetic, ties, dare, ae_bases."),
    ] = "compress",
    num_bases: NumBases = 0.5,
    dtype: Annotated[str, typer.Option("--dtype", help="What the result is stored in; auto: as the base.")] = "auto",
    processes: Annotated[int, typer.Option(help="Processes that share the work (accelerate launch).", min=1)] = 1,
    threads: Threads = None,
    bandwidth: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of the disk that all processes share, per second, as 2GB; left out: measured on a local base."
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Bytes read and written, peak memory, arithmetic and time of a job; weights are not read, nor downloaded.

    --base is a checkpoint, a Hub id, or the config.json of a causal language model.
    """
    from . import planning
    from .tables import print_plan

    check_json(json)
    infos = planning.headers(base)
    if job not in ("gram", "compress"):
        with contextlib.suppress(ImportError):  # a merge has mergekit in memory, and so has its plan
            import tvbases_mergekit.native  # noqa: F401
    found = planning.plan(
        infos,
        models,
        job,
        num_bases=num_bases,
        dtype=parse_dtype(dtype),
        processes=processes,
        threads=threads,
        bandwidth=parse_size(bandwidth, "--bandwidth") or planning.bandwidth_of(base),
    )
    if not quiet:
        print_plan(found.to_json(), console)
    write_report(json, found.to_json())
