"""``tvbases compress``: a basis directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ..errors import ParameterError
from .app import app
from .derived import DerivedCommand, given
from .hub import PushToHub
from .options import (
    Base,
    Device,
    DryRun,
    Dtype,
    EqualRank,
    ExtraRows,
    Host,
    Json,
    Memory,
    Out,
    Quiet,
    Resume,
    Revision,
    Task,
    Threads,
    parse_dtype,
    parse_weights,
    rank_option,
    scale_option,
    tell,
)


class BasisCommand(DerivedCommand):
    """A command with the options of all constructions."""

    method_help = (
        "How the models are replaced; joint is for adapters only, pca for full checkpoints. Default: ae; for adapters "
        "without --num-bases, whatever loses least."
    )

    def methods(self) -> Mapping[str, Mapping[str, Any]]:
        from ..basis.request import all_options

        return all_options()

    def common(self) -> Mapping[str, Mapping[str, Any]]:
        from ..basis.request import POOL_OPTIONS

        return {"adapters": POOL_OPTIONS}


def _moved(value: str | None) -> None:
    if value is not None:
        raise ParameterError(f"--online is a command of its own now: tvbases online --out {value} --task NAME=PATH ...")


@app.command(
    cls=BasisCommand,
    epilog="Example: tvbases compress --base llama/ --task math=math/ --task code=code/ --num-bases 0.5 --out basis/",
)
def compress(
    context: typer.Context,
    base: Base,
    task: Task,
    out: Out,
    num_bases: Annotated[
        float | None,
        typer.Option(
            "--num-bases",
            "-m",
            help="How many bases; a number below 1 is a fraction of the tasks. Default: 0.5; cluster chooses it.",
        ),
    ] = None,
    rank: Annotated[
        str | None, rank_option("tsv: of each matrix, default: 1/T; adapters: of each basis vector.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the models' bytes to keep, for tsv and for adapters with any method. Default: 0.5."
        ),
    ] = None,
    alpha: Annotated[float, scale_option("of adapters: PEFT loads the directory as base + alpha * sum.")] = 1.0,
    equal_rank: EqualRank = False,
    host: Host = None,
    dtype: Dtype = "auto",
    extra_rows: ExtraRows = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    revision: Revision = None,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
    online: Annotated[str | None, typer.Option(hidden=True, is_eager=True, callback=_moved)] = None,
) -> None:
    """Replace T fine-tuned models with M vectors and a decoder. The output is a basis directory.

    For adapters, the directory is itself a LoRA that PEFT loads: the merged multi-task adapter.
    """
    from ..basis.compress import compress as run
    from ..models.vectors import parse_tasks
    from .library import _print_change as print_change
    from .tables import print_compression

    options, tasks = given(context), parse_tasks(task)
    if "target_weights" in options:
        options["target_weights"] = parse_weights(options["target_weights"], tasks)
    sizes: dict[str, Any] = {"num_bases": num_bases, "budget": budget, "rank": rank, "alpha": alpha}
    sizes |= {"equal_rank": equal_rank, "host": host}
    where: dict[str, Any] = {"dtype": parse_dtype(dtype), "device": device, "dry_run": dry_run}
    found = run(base, tasks, out, extra_rows=extra_rows, **sizes, **where, **options)
    tell(found, print_change if "clusters" in found else print_compression, json)
