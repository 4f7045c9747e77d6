"""``tvbases tune``: the scale of a merge, by what it is worth."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import defaults
from ..text import printable
from .app import app
from .data import TEMPLATES, BatchSize, Classes, Data, ImageColumn, LabelColumn, Templates, TextColumn
from .evaluate import Continuations, Control, EvaluationDevice, IncludePath, Limit, Prompts, ScorerName, Target, plan_of
from .hub import PushToHub
from .negate import numbers
from .options import (
    AdapterOut,
    DrawnHtml,
    DryRun,
    Dtype,
    EqualRank,
    ExtraRows,
    Host,
    Json,
    Memory,
    Quiet,
    Seed,
    Threads,
    TrustRemoteCode,
    file_option,
    parse_dtype,
    rank_option,
    tell,
)


@app.command(epilog="Example: tvbases tune merge.yml merged/ --data math=math.jsonl --control text:prose.txt")
def tune(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML; models may be adapters.", metavar="CONFIG")],
    out: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT")],
    target: Target = None,
    control: Control = None,
    data: Data = None,
    classes: Classes = None,
    template: Templates = TEMPLATES,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    image_column: ImageColumn = "image",
    alphas: Annotated[
        str | None,
        typer.Option(help="Scales to try, ascending; default: 0.1 to 4, with growing steps.", metavar="A,B,..."),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of every control's metric that has to stay.")] = defaults.KEEP,
    per_basis: Annotated[
        bool,
        typer.Option(
            "--per-basis", help="After that, find a scale for each basis, or each model, that the YAML adds up."
        ),
    ] = False,
    plot: Annotated[Path | None, file_option("Draw the metrics over alpha.", "PNG", draws=True)] = None,
    adapter: AdapterOut = False,
    rank: Annotated[str | None, rank_option("what is kept of the merged adapter; default: all of it.")] = None,
    equal_rank: EqualRank = False,
    host: Host = None,
    dtype: Dtype = "auto",
    extra_rows: ExtraRows = None,
    prompts: Prompts = None,
    scorer: ScorerName = "profanity",
    continuations: Continuations = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: EvaluationDevice = None,
    threads: Threads = None,
    memory: Memory = None,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
    html: DrawnHtml = None,
) -> None:
    """Merge at the scale that data or lm-eval tasks like best.

    It is the base plus alpha times what the YAML adds to it. Targets, and all data that are no controls, should rise;
    controls stay. Where no scale is better than the base on all targets it says so, writes nothing and ends with exit
    code 2.
    """
    from tvbases_lm_eval.tune import check_helps, tune_merge
    from tvbases_mergekit import merge, open_merge, summands

    measuring = {"scorer": scorer, "continuations": continuations, "limit": limit, "seed": seed}
    measuring["include"] = include_path
    columns = {"text": text_column, "label": label_column, "image": image_column, "templates": template}
    plan = plan_of(target, control, prompts, data, classes, columns, batch_size=batch_size, **measuring)
    tried = defaults.SCALES if alphas is None else numbers(alphas)
    how: dict[str, Any] = {"adapter": adapter, "rank": rank, "dtype": parse_dtype(dtype), "seed": seed}
    how |= {"extra_rows": extra_rows, "equal_rank": equal_rank, "host": host}
    if dry_run:
        return tell(merge(config, out, dry_run=True, **how), _show, json)
    job = open_merge(config, out, **how)
    choosing: dict[str, Any] = {"keep": keep, "alphas": tried, "summands": summands(job) if per_basis else None}
    found = tune_merge(job.plan(), out, plan, device=device, trained=job.trained, **choosing, **job.how)
    if plot:
        from tvbases_lm_eval.plots import plot_tuning

        plot_tuning(found["tuning"], plot)
    tell(found, _show, json, html, functools.partial(_picture, found))
    check_helps(found)


def _picture(found: dict[str, Any]) -> bytes:
    from tvbases_lm_eval.plots import draw_tuning

    return draw_tuning(found["tuning"])


def _show(found: dict[str, Any], console: Any) -> None:
    from ..learning.tuning import Tuning
    from ..sheet import Sheet
    from .tables import print_loading

    tuning = Tuning.from_json(found["tuning"])
    table = Sheet("alpha", *(printable(_titled(tuning, task)) for task in tuning.curve.metrics))
    for alpha in tuning.curve.alphas:
        notes = "base" if alpha == 0 else f"{alpha:g}{' *' if alpha == tuning.alpha else ''}"
        table.add_row(notes, *(f"{value:.4g}" for value in tuning.curve.at(alpha).values()))
    console.print(table)
    if tuning.helps:
        console.print(f"{found['out']}: {printable(tuning.summary())}", highlight=False, soft_wrap=True)
        for label, alpha in found.get("coefficients", {}).items():
            console.print(f"  {printable(label)}: {alpha:g}", highlight=False)
        print_loading(found, console)


def _titled(tuning: Any, task: str) -> str:
    unit = f", {tuning.units[task]}" if task in tuning.units else ""
    return f"{task} ({'control' if task in tuning.controls else 'target'}{unit})"
