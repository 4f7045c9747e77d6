"""``tvbases negate``: a model that has forgotten a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import ParameterError
from .app import app, console
from .evaluate import BatchSize, Continuations, Control, Data, Device, Limit, ScorerName, Seed, Target
from .options import Base, Json, Quiet, Task, check_file, check_json, write_report


@app.command(
    epilog="Example: tvbases negate --base llama/ --task toxic=toxic/ --task chat=chat/ --forget toxic "
    "--component unique --alpha 0.5 --out clean/"
)
def negate(
    base: Base,
    task: Task,
    forget: Annotated[str, typer.Option("--forget", help="The task to forget.", metavar="NAME")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the edited model.", metavar="DIR")],
    component: Annotated[
        str, typer.Option(help="What is negated: plain (the task vector), unique (DeVec) or reconstructed (AE bases).")
    ] = "plain",
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="How much; left out: the largest of --alphas at which --control keeps --keep of its metric."),
    ] = None,
    alphas: Annotated[
        str, typer.Option(help="The grid, ascending.", metavar="A,B,...")
    ] = "0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    keep: Annotated[float, typer.Option(help="Share of the control metric that has to stay.")] = 0.95,
    target: Target = None,
    control: Control = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Measure every alpha, for all three components; for --plot and --json.")
    ] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Target against control over alpha.", metavar="PNG")] = None,  # noqa: UP045
    adapter: Annotated[bool, typer.Option("--adapter", help="Adapters in: write an adapter.")] = False,
    threshold: Annotated[
        float, typer.Option(help="unique: degree of sharing above which a direction is shared.")
    ] = 0.85,
    subspace: Annotated[str, typer.Option(help="unique: chain (the paper's), mean or angles.")] = "chain",
    pool: Annotated[str, typer.Option(help="unique: iterative (the paper's for toxicity) or joint.")] = "iterative",
    rank: Annotated[
        str, typer.Option(help="unique: dimensions of a task's subspace, for full fine-tunes and DoRA.")
    ] = "energy:0.95",
    num_bases: Annotated[
        float,
        typer.Option("--num-bases", "-m", help="reconstructed: how many bases; below 1, a fraction of the tasks."),
    ] = 0.5,
    even_errors: Annotated[
        bool, typer.Option("--even-errors", help="reconstructed: by bases that give none of the tasks up.")
    ] = False,
    data: Data = None,
    scorer: ScorerName = "profanity",
    continuations: Continuations = None,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Forget a task: the base minus alpha times its vector, what is unique to it, or its AE reconstruction."""
    from ..learning.directions import COMPONENTS, check_component
    from ..merging.changes import Edit
    from ..merging.write import is_checkpoint_of_ours, write
    from ..methods.devec import Options
    from ..models.lora_files import is_adapter_directory
    from ..models.vectors import Vectors, parse_tasks
    from ..storage.output import check_output
    from .tables import warn

    check_json(json)
    check_file(plot, "--plot")
    tasks = parse_tasks(task)
    check_component(component, len(tasks))
    check_output(out, is_adapter_directory if adapter else is_checkpoint_of_ours)
    options = Options(threshold, subspace, pool, rank=rank)
    if alpha is not None and (curve or plot or target or control):
        raise ParameterError("--alpha says how much; --target, --control, --curve and --plot are for choosing it")
    if plot and not curve:
        raise ParameterError("--plot draws the curve of every component; add --curve")

    from tvbases_lm_eval.forget import Request, check_plan, curves, directions
    from tvbases_lm_eval.plan import Plan

    components = COMPONENTS if curve and len(tasks) > 1 else (component,)
    request = Request(forget, components, options, num_bases, keep, _numbers(alphas), curve, even_errors)
    plan = None
    if alpha is None:
        plan = Plan.of(target or [], control or [], data or [], scorer, continuations, limit, seed, batch_size)
        check_plan(plan)
    vectors = Vectors.open(base, tasks)
    warn(vectors.coverage.notes())
    found = directions(vectors, request)
    report: dict[str, object] = {"base": base, "forget": forget, "component": component}
    if plan is not None:
        from tvbases_lm_eval.variants import BEFORE, Variant, Where, load

        loaded = Variant(BEFORE, *load(base, Where(device)))
        negations = curves(vectors, found, loaded, request, plan)
        alpha = negations[component].alpha
        report["curves"] = {name: negation.to_json() for name, negation in negations.items()}
        if plot:
            from tvbases_lm_eval.plots import plot_negations

            plot_negations(negations, forget, plot)
        if not quiet:
            for name, negation in negations.items():
                console.print(f"{name}: {negation.summary()}", highlight=False)
    assert alpha is not None
    forgotten = Edit.of(vectors, found[component], f"{forget} forgotten, {component}, {alpha:g}", -alpha)
    write(forgotten, out, as_adapter=adapter)
    report |= {"alpha": alpha, "out": str(out)}
    if not quiet:
        console.print(f"{out}: {base} - {alpha:g} * {component} of {forget}", highlight=False)
    write_report(json, report)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ParameterError(
            f'--alphas "{text}" is not numbers with commas between them, such as 0.1,0.2,0.5'
        ) from error
