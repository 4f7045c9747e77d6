"""``tvbases lm-eval-tasks`` and ``tvbases evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
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
from .options import Dtype, Json, Quiet, Revision, TrustRemoteCode, hub_ids, parse_dtype, tell

if TYPE_CHECKING:
    from tvbases_lm_eval.plan import Plan

Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="What should change: a NAME of --data, an lm-eval task, or text:FILE; repeat.", metavar="TASK"
    ),
]
Control = Annotated[
    list[str] | None,
    typer.Option(
        "--control", help="What should stay: a NAME of --data, an lm-eval task, or text:FILE; repeat.", metavar="TASK"
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        help="toxigen=FILE or realtoxicityprompts=FILE: prompts to use instead of the Hub's; repeat.",
        metavar="NAME=FILE",
    ),
]
ScorerName = Annotated[
    str,
    typer.Option(
        "--scorer",
        help="What scores texts: profanity (offline), a text classifier (path or id), or python:module.function.",
    ),
]
Continuations = Annotated[
    int | None,
    typer.Option("--continuations", "-k", help="How often each prompt is continued; default: as the task says."),
]
IncludePath = Annotated[
    list[str] | None,
    typer.Option("--include-path", help="A directory with lm-eval task files of your own; repeat.", metavar="DIR"),
]
Limit = Annotated[int | None, typer.Option("--limit", help="How many documents of each task to use; default: all.")]
SamplingSeed = Annotated[
    int, typer.Option("--seed", help="The seed of whatever is drawn at random: the sampled texts.")
]
EvaluationDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where to compute: cpu, cuda, or auto (all GPUs, the rest offloaded); default: a GPU if there is one.",
        metavar="NAME",
    ),
]


def plan_of(
    target: list[str] | None,
    control: list[str] | None,
    prompts: list[str] | None,
    data: list[str] | None,
    classes: list[str] | None,
    columns: dict[str, Any],
    **how: Any,
) -> Plan:
    """What is measured, as the options of a command say it."""
    from tvbases_lm_eval.plan import Plan, parse_prompts

    from ..learning.batches import Columns
    from ..models.vectors import parse_tasks

    sources = parse_tasks(data or ())
    read = Columns(**columns, classes=parse_classes(classes or (), sources))
    how |= {"prompts": parse_prompts(prompts or ()), "data": sources, "columns": read}
    how["include"] = tuple(how.get("include") or ())
    return Plan(tuple(target or ()), tuple(control or ()), **how)


@app.command("lm-eval-tasks", epilog='Example: tvbases lm-eval-tasks; lm_eval ls tasks --include_path "$(...)"')
def lm_eval_tasks() -> None:
    """Print the directory of our lm-eval tasks. They measure toxicity and negation, with lm_eval --include_path."""
    from tvbases_lm_eval import include_path

    print(include_path())


@app.command(epilog="Example: tvbases evaluate basis/ --task math --target gsm8k --control text:prose.txt")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, an adapter or a basis directory.", metavar="MODEL", callback=hub_ids)
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The pretrained model: a directory or a Hub id; default: the one that MODEL names.",
            metavar="PATH_OR_ID",
            callback=hub_ids,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="A fine-tuned model in the basis; repeat; default: all of them.", metavar="NAME"),
    ] = None,
    target: Target = None,
    control: Control = None,
    data: Data = None,
    classes: Classes = None,
    template: Templates = TEMPLATES,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    image_column: ImageColumn = "image",
    prompts: Prompts = None,
    scorer: ScorerName = "profanity",
    continuations: Continuations = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    seed: SamplingSeed = 0,
    batch_size: BatchSize = 16,
    device: EvaluationDevice = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Measure the base and MODEL on data and lm-eval tasks. Targets and controls are in one table."""
    from tvbases_lm_eval.evaluate import evaluate_model
    from tvbases_lm_eval.table import print_table

    how = {"scorer": scorer, "continuations": continuations, "limit": limit, "seed": seed, "batch_size": batch_size}
    how["include"] = include_path
    columns = {"text": text_column, "label": label_column, "image": image_column, "templates": template}
    plan = plan_of(target, control, prompts, data, classes, columns, **how)
    found = evaluate_model(model, plan, base=base, tasks=task, device=device, dtype=parse_dtype(dtype))
    tell(found, print_table, json)
