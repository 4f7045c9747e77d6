"""``tvbases extract``: full fine-tunes as LoRAs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import defaults
from .app import app
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
    rank_option,
    tell,
)


@app.command(epilog="Example: tvbases extract --base llama/ --task math=math/ --rank 32 --out loras/")
def extract(
    base: Base,
    task: Task,
    out: Out,
    rank: Annotated[str | None, rank_option("what is kept of each matrix's change; energy:1 keeps all.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Instead of --rank: the share of a model's bytes that its LoRA may take up.")
    ] = None,
    save: Annotated[
        defaults.Saved,
        typer.Option(
            help="What is saved whole: everything without factors, such as embeddings (all), norms and biases, or none."
        ),
    ] = "all",
    extra_rows: ExtraRows = None,
    equal_rank: EqualRank = False,
    host: Host = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    revision: Revision = None,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Write the change of full fine-tunes as LoRAs for PEFT. Each task has OUT/NAME."""
    from ..merging.extract import extract as run
    from ..models.vectors import parse_tasks
    from .tables import print_extraction

    how: dict[str, Any] = {"save": save, "equal_rank": equal_rank, "host": host, "device": device, "dry_run": dry_run}
    how |= {"rank": rank, "budget": budget, "extra_rows": extra_rows, "dtype": parse_dtype(dtype)}
    found = run(base, parse_tasks(task), out, **how)
    tell(found, print_extraction, json)
