"""``tvbases plan``: what a job will cost, before it is begun."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from .. import defaults
from .app import app, console
from .options import Base, Dtype, Json, NumBases, Quiet, Revision, Threads, parse_dtype, parse_size, report


@app.command(epilog="Example: tvbases plan --base meta-llama/Llama-3.1-8B --models 8 --job ae_bases --bandwidth 2GB")
def plan(
    base: Base,
    models: Annotated[int, typer.Option(help="How many full fine-tunes of the base.", min=1)],
    job: Annotated[
        defaults.Job,
        typer.Option("--job", help="What to plan: the Gram matrix, compression, or a merge by this method."),
    ] = "compress",
    num_bases: NumBases = defaults.NUM_BASES,
    dtype: Dtype = "auto",
    processes: Annotated[int, typer.Option(help="Processes that share the work (accelerate launch).", min=1)] = 1,
    threads: Threads = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            help="Of the disk that all processes share, per second, such as 2GB; default: measured on a local base."
        ),
    ] = None,
    revision: Revision = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Predict the bytes, peak memory and time of a job. No weights are read or downloaded.

    --base may also be the config.json of a causal language model.
    """
    from . import planning
    from .tables import print_plan

    if job not in ("gram", "compress"):
        with contextlib.suppress(ImportError):  # a merge has mergekit in memory, and so has its plan
            import tvbases_mergekit.native  # noqa: F401
    rate, stored = parse_size(bandwidth, "--bandwidth"), parse_dtype(dtype)
    found = planning.plan(
        base, models, job, num_bases=num_bases, dtype=stored, processes=processes, bandwidth=rate
    ).to_json()
    report(json, found)
    print_plan(found, console)
