"""``tvbases lm-eval-tasks`` and ``tvbases evaluate``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .app import app, console
from .options import Json, Quiet, check_json, parse_dtype, write_report

Target = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--target", help="An lm-eval task, or text:FILE (its perplexity); repeat for more.", metavar="TASK"),
]
Control = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--control", help="What should stay: an lm-eval task, or text:FILE.", metavar="TASK"),
]
Data = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--data", help="toxigen=FILE or realtoxicityprompts=FILE instead of the Hub's.", metavar="NAME=FILE"),
]
ScorerName = Annotated[
    str,
    typer.Option("--scorer", help="profanity (offline), a text classifier by path or id, or python:module.function."),
]
Continuations = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--continuations", "-k", help="Samples of each prompt; left out: the task's own."),
]
Limit = Annotated[Optional[int], typer.Option(help="Documents of every task; for trying out.")]  # noqa: UP045
Seed = Annotated[int, typer.Option(help="Of sampling.")]
BatchSize = Annotated[int, typer.Option(help="Prompts at a time; samples depend on it.")]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="cpu, cuda, auto (all GPUs, the rest offloaded); left out: a GPU if there is one."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Loaded as: auto, float32, bfloat16 or float16.")]


@app.command("lm-eval-tasks", epilog='Example: tvbases lm-eval-tasks; lm_eval ls tasks --include_path "$(...)"')
def lm_eval_tasks() -> None:
    """Print the directory of the toxicity and negation tasks, for lm_eval --include_path."""
    from tvbases_lm_eval import include_path

    print(include_path())


@app.command(epilog="Example: tvbases evaluate basis/ --task math --target gsm8k --control text:prose.txt")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint, an adapter or a basis directory.", metavar="MODEL")],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--base", help="The model before; left out: what MODEL names.", metavar="PATH_OR_ID"),
    ] = None,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--task", help="A task of a basis; repeat for more; left out: all.", metavar="NAME"),
    ] = None,
    target: Target = None,
    control: Control = None,
    data: Data = None,
    scorer: ScorerName = "profanity",
    continuations: Continuations = None,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """lm-eval before and after: targets and controls of the base, and of MODEL, in one table."""
    check_json(json)
    loaded_as = parse_dtype(dtype)
    from tvbases_lm_eval.plan import Plan

    plan = Plan.of(target or [], control or [], data or [], scorer, continuations, limit, seed, batch_size)
    from tvbases_lm_eval.evaluate import evaluate as run
    from tvbases_lm_eval.table import print_table
    from tvbases_lm_eval.variants import Where, variants

    found = run(variants(model, base, task, Where(device, loaded_as)), plan)
    if not quiet:
        print_table(found, console)
    write_report(json, found)
