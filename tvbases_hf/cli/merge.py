"""``tvbases merge`` and ``tvbases mergekit-yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import ParameterError
from .app import app, console
from .options import Device, Json, Memory, Quiet, Resume, Threads, check_json, parse_dtype, resources, write_report


@app.command(epilog="Example: tvbases merge merge.yml merged-lora/ --adapter --rank 16")
def merge(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML; models may be adapters.", metavar="CONFIG")],
    out: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Adapters in: write an adapter, not a checkpoint.")
    ] = False,
    rank: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Cut the adapter: 16, 0.25, energy:0.99, ...; left out: nothing is cut.", metavar="RULE"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="auto (the YAML's, else the base's own, factors: float32), float32, bfloat16, float16."
        ),
    ] = "auto",
    random_seed: Annotated[int, typer.Option(help="Of methods that draw at random, such as dare_ties.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    resume: Resume = True,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """A mergekit YAML, executed on the changes of weights: no model is built, adapters stay adapters."""
    from tvbases_mergekit import register

    register()  # before anything that needs mergekit is imported: its message names the extra
    from tvbases_mergekit import native

    from ..storage.run import find_device
    from .tables import print_merge, warn

    check_json(json)
    place = find_device(device)
    if place.type != "cpu" and adapter:
        raise ParameterError("--device is of merges into a checkpoint; factors of adapters are small: leave it out")
    if memory is not None and adapter:
        raise ParameterError("--memory is kept by merges into a checkpoint; an adapter is held whole: leave it out")
    request = native.Request(adapter, rank, parse_dtype(dtype), random_seed, place)
    with resources(threads, memory, resume):
        found = native.merge(config, out, request)
    warn(found["warnings"])
    if not quiet:
        print_merge(found, console)
    write_report(json, found)


@app.command(
    "mergekit-yaml",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: tvbases mergekit-yaml merge.yml merged/ --cuda",
)
def mergekit_yaml(context: typer.Context) -> None:
    """mergekit-yaml with ae_bases and friends: CONFIG OUT and every option that mergekit has."""
    from tvbases_mergekit.command import merge

    merge(context.args)
