"""``tvbases negate``: a model that has forgotten a task."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import defaults
from ..errors import ParameterError
from .app import app
from .data import TEMPLATES, BatchSize, Classes, Data, ImageColumn, LabelColumn, Templates, TextColumn
from .evaluate import (
    Continuations,
    Control,
    EvaluationDevice,
    IncludePath,
    Limit,
    Prompts,
    SamplingSeed,
    ScorerName,
    Target,
    plan_of,
)
from .hub import PushToHub
from .options import (
    AdapterOut,
    Base,
    DrawnHtml,
    DryRun,
    EqualRank,
    ExtraRows,
    Host,
    Json,
    Memory,
    NumBases,
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
    rank_option,
    scale_option,
    tell,
)


@app.command(
    epilog="Example: tvbases negate --base llama/ --task toxic=toxic/ --task chat=chat/ --forget toxic "
    "--component unique --alpha 0.5 --out clean/"
)
def negate(
    base: Base,
    task: Task,
    forget: Annotated[
        list[str],
        typer.Option(
            "--forget",
            help="The task to forget; repeated for several fine-tunes of it, what all of them change alike is "
            "forgotten.",
            metavar="NAME",
        ),
    ],
    out: Out,
    component: Annotated[
        defaults.Component,
        typer.Option(
            "--component", help="Of the task vector: all of it (plain), what is unique to it, or its AE reconstruction."
        ),
    ] = "plain",
    alpha: Annotated[
        float | None,
        scale_option("how much to take away; default: the largest of --alphas at which --control keeps --keep."),
    ] = None,
    alphas: Annotated[
        str | None, typer.Option(help="Scales to try, ascending; default: 0 to 1 in steps of 0.05.", metavar="A,B,...")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of every control's metric that has to stay.")] = defaults.KEEP,
    target: Target = None,
    control: Control = None,
    data: Data = None,
    classes: Classes = None,
    template: Templates = TEMPLATES,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    image_column: ImageColumn = "image",
    curve: Annotated[
        bool, typer.Option("--curve", help="Measure every alpha for all three components, for --plot and --json.")
    ] = False,
    plot: Annotated[Path | None, file_option("Draw target and control over alpha; needs --curve.", "PNG", True)] = None,
    adapter: AdapterOut = False,
    equal_rank: EqualRank = False,
    host: Host = None,
    threshold: Threshold = defaults.THRESHOLD,
    subspace: Subspace = "chain",
    pool: Annotated[
        defaults.Pool,
        typer.Option(
            "--pool", help="Shared is what any other task shares (iterative, the paper's for toxicity), or all (joint)."
        ),
    ] = defaults.FORGETTING_POOL,
    side: Side = "column",
    rank: Annotated[
        str, rank_option("how many dimensions the subspace of a full fine-tune or a DoRA has.")
    ] = defaults.RANK,
    num_bases: NumBases = defaults.NUM_BASES,
    even_errors: Annotated[
        bool,
        typer.Option("--even-errors", help="Let the bases reconstruct all tasks about equally well, and give none up."),
    ] = False,
    extra_rows: ExtraRows = None,
    prompts: Prompts = None,
    scorer: ScorerName = "profanity",
    continuations: Continuations = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    seed: SamplingSeed = 0,
    batch_size: BatchSize = 16,
    device: EvaluationDevice = None,
    threads: Threads = None,
    memory: Memory = None,
    dry_run: DryRun = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
    html: DrawnHtml = None,
) -> None:
    """Forget a task: write the base minus alpha times its vector. Or minus what is unique to it, or its reconstruction.

    Unless you say otherwise, data of the forgotten task is the target, and all other data are controls.
    """
    from tvbases_lm_eval.forget import negate_task

    from ..methods.devec import Options
    from ..models.vectors import Vectors, parse_tasks
    from .tables import warn

    if plot and not curve:
        raise ParameterError("--plot draws the curve of every component; add --curve")
    options = Options(threshold, subspace, pool, side, rank)
    tried = defaults.ALPHAS if alphas is None else numbers(alphas)
    plan = None
    if alpha is None or target or control or data:
        measuring = {"scorer": scorer, "continuations": continuations, "limit": limit, "seed": seed}
        measuring["include"] = include_path
        columns = {"text": text_column, "label": label_column, "image": image_column, "templates": template}
        plan = plan_of(target, control, prompts, data, classes, columns, batch_size=batch_size, **measuring)
    vectors = Vectors.open(base, parse_tasks(task), extra_rows=extra_rows, rows_of_base=True)
    warn(vectors.coverage.notes())
    how: dict[str, Any] = {"component": component, "alpha": alpha, "alphas": tried, "keep": keep, "curve": curve}
    how |= {"options": options, "num_bases": num_bases, "even_errors": even_errors, "adapter": adapter}
    how |= {"equal_rank": equal_rank, "host": host}
    found = negate_task(vectors, forget, out, plan, device=device, dry_run=dry_run, **how)
    if plot and "curves" in found:
        from tvbases_lm_eval.plots import plot_negations

        plot_negations(found["curves"], found["forget"], plot)
    tell(found, _show, json, html, functools.partial(_picture, found) if "curves" in found else None)


def _picture(found: dict[str, Any]) -> bytes:
    from tvbases_lm_eval.plots import draw_negations

    return draw_negations(found["curves"], found["forget"])


def _show(found: dict[str, Any], console: Any) -> None:
    from ..learning.negation import Negation
    from .tables import print_loading

    for name, negation in found.get("curves", {}).items():
        console.print(f"{name}: {Negation.from_json(negation).summary()}", highlight=False)
    what = f"{found['alpha']:g} * {found['component']} of {found['forget']}"
    console.print(f"{found['out']}: {found['base']} - {what}", highlight=False, soft_wrap=True)
    print_loading(found, console)


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ParameterError(
            f'--alphas "{text}" is not numbers with commas between them, such as 0.1,0.2,0.5'
        ) from error
