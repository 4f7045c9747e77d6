"""The ``tvbases`` command: parse, call, print. Bad input is one message and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from tvbases_mergekit.hook import hook_app

from .errors import MissingExtraError, OutputError, ParameterError, TvbasesError

app = typer.Typer(
    help="Task-vector bases: compress, merge and edit fine-tuned models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(hook_app, name="hook")
console = Console()

Base = Annotated[
    str, typer.Option("--base", help="The pretrained model: a directory or a Hub id.", metavar="PATH_OR_ID")
]
Task = Annotated[
    list[str], typer.Option("--task", help="A fine-tuned model; repeat for each.", metavar="NAME=PATH_OR_ID")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no report.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="Write the report as JSON.", metavar="FILE")]  # noqa: UP045
NumBases = Annotated[
    float, typer.Option("--num-bases", "-m", help="How many bases; a number below 1 is a fraction of the tasks.")
]


@app.command(epilog="Example: tvbases inspect --base llama/ --task math=math/ --task code=code/")
def inspect(
    base: Base,
    task: Task,
    layers: Annotated[bool, typer.Option("--layers", help="Also interference and sharing by layer (slower).")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw everything; implies --layers.", metavar="PNG")] = None,  # noqa: UP045
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """How long and how similar task vectors are, how many bases they need, and whether the base is theirs."""
    from .gram import gram_matrix
    from .layers import examine_layers
    from .report import inspection, print_inspection, warn
    from .taskvector import TaskVectors, parse_tasks

    _check_json(json)
    vectors = TaskVectors.open(base, parse_tasks(task))
    found = inspection(vectors, gram_matrix(vectors, quiet=quiet))
    warn(found["warnings"])
    if layers or plot:
        found["layers"] = vars(examine_layers(vectors, quiet=quiet))
    if plot:
        from .plots import plot_inspection

        plot_inspection(found, plot)
    if not quiet:
        print_inspection(found, console)
    _write_json(json, found)


@app.command(
    epilog="Example: tvbases compress --base llama/ --task math=math/ --task code=code/ --num-bases 0.5 --out basis/"
)
def compress(
    base: Base,
    task: Task,
    out: Annotated[Path, typer.Option("--out", help="The basis directory to write.", metavar="DIR")],
    num_bases: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--num-bases", "-m", help="How many bases; a number below 1 is a fraction of the tasks (0.5)."),
    ] = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--method",
            help="ae, pca, rand_select, tsv (truncated task vectors), joint (adapters: shared factors). "
            "Left out: ae; for adapters whatever loses least.",
        ),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option(help="ae: every task weighs the same in the sum of the bases (--no-balance: as in the paper)."),
    ] = True,
    solver: Annotated[str, typer.Option(help="ae: varpro (the optimum) or adam (the paper's recipe).")] = "varpro",
    seed: Annotated[int, typer.Option(help="ae, rand_select: which of equally good bases; which tasks.")] = 0,
    rank: Annotated[
        str | None,
        typer.Option(help="tsv: 16, 0.25, energy:0.95, gavish-donoho; left out: 1/T. ae of adapters: of each atom."),
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="tsv, and any method for adapters (0.5): share of the task vectors' bytes to keep."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="adapters: the basis loads in PEFT as base + alpha * sum of the bases.")
    ] = 1.0,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Stored as: auto (the base's or adapters' own), float32, bfloat16 or float16."),
    ] = "auto",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Replace T fine-tuned models by M vectors and a small decoder: a basis directory.

    Of adapters, the directory is itself a LoRA that PEFT loads: the merged multi-task adapter.
    """
    from .adapter_basis import Request
    from .bases.ae import SOLVERS
    from .bases.weights import resolve_num_bases
    from .basis import METHODS, Basis
    from .gram import gram_matrix
    from .info import is_basis_directory
    from .output import check_output
    from .report import compression, print_compression, warn
    from .taskvector import TaskVectors, parse_tasks

    # Whatever can be wrong is found before the long reading, not after it.
    _check_json(json)
    check_output(out, is_basis_directory)
    _check_choice("--method", method or "ae", (*METHODS, "tsv", "joint"))
    _check_choice("--solver", solver, SOLVERS)
    stored = _dtype(dtype)
    tasks = parse_tasks(task)
    resolve_num_bases(0.5 if num_bases is None else num_bases, len(tasks))
    vectors = TaskVectors.open(base, tasks)
    options = {"balance": balance, "solver": solver, "seed": seed}
    request = Request(method, budget, num_bases, rank, alpha, options)
    request = request.resolved(len(tasks)) if vectors.are_adapters else request
    if not vectors.are_adapters and (method == "joint" or alpha != 1):
        raise ParameterError("--method joint and --alpha are for adapters; these are full checkpoints")
    gram = gram_matrix(vectors, quiet=quiet)
    warn([*vectors.coverage.notes(), *gram.warnings()])
    how: dict[str, Any] = {"dtype": stored, "gram": gram, "quiet": quiet}
    if vectors.are_adapters:
        built = Basis.of_adapters(vectors, request, **how)
    elif method == "tsv":
        built = Basis.truncate(vectors, rank, budget=budget, **how)
    else:
        used = {"ae": options, "rand_select": {"seed": seed}}.get(method or "ae", {})
        built = Basis.build(vectors, 0.5 if num_bases is None else num_bases, method=method or "ae", **how, **used)
    built.save_pretrained(out, quiet=quiet)
    found = compression(Basis.from_pretrained(out), vectors, gram, out)
    if not quiet:
        print_compression(found, console)
    _write_json(json, found)


@app.command(epilog="Example: tvbases decompose --base llama/ --task toxic=toxic/ --task chat=chat/ --out parts/")
def decompose(
    base: Base,
    task: Task,
    out: Annotated[Path, typer.Option("--out", help="Where to write unique/TASK and shared.", metavar="DIR")],
    threshold: Annotated[
        float, typer.Option(help="Degree of sharing, 0 to 1, above which a direction is shared.")
    ] = 0.85,
    subspace: Annotated[
        str, typer.Option(help="chain (the paper's), mean (order-free) or angles (two tasks).")
    ] = "chain",
    pool: Annotated[str, typer.Option(help="joint, iterative or pairs.")] = "joint",
    side: Annotated[str, typer.Option(help="column (output directions) or row (input directions).")] = "column",
    rank: Annotated[
        str, typer.Option(help="Dimensions of a task's subspace: energy:0.95, 0.25, 16, ...")
    ] = "energy:0.95",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Split task vectors into what they share and what is unique to each (DeVec), as checkpoints."""
    from .components import is_components, write_components
    from .output import check_output
    from .report import print_components, warn
    from .shared import Options
    from .taskvector import TaskVectors, parse_tasks

    options = Options(threshold, subspace, pool, side, rank)
    check_output(out, is_components)
    vectors = TaskVectors.open(base, parse_tasks(task))
    warn(vectors.coverage.notes())
    found = write_components(vectors, options, out, quiet=quiet)
    if not quiet:
        print_components(found, console)
    _write_json(json, found)


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
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """A mergekit YAML, executed on the changes of weights: no model is built, adapters stay adapters."""
    from tvbases_mergekit import register

    register()  # before anything that needs mergekit is imported: its message names the extra
    from tvbases_mergekit import native

    from .report import print_merge, warn

    _check_json(json)
    found = native.merge(config, out, native.Request(adapter, rank, _dtype(dtype), random_seed, quiet))
    warn(found["warnings"])
    if not quiet:
        print_merge(found, console)
    _write_json(json, found)


@app.command(
    "mergekit-yaml",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: tvbases mergekit-yaml merge.yml merged/ --cuda",
)
def mergekit_yaml(context: typer.Context) -> None:
    """mergekit-yaml with ae_bases and friends: CONFIG OUT and every option that mergekit has."""
    from tvbases_mergekit.command import merge

    merge(context.args)


@app.command(epilog="Example: tvbases doctor")
def doctor(json: Json = None) -> None:
    """Versions of everything that matters, which extras are here, whether the hook is installed, free disk."""
    from .doctor import examine, print_findings

    _check_json(json)
    found = examine()
    print_findings(found, console)
    _write_json(json, found)


@app.command(epilog="Example: tvbases demo --json demo.json")
def demo(
    workdir: Annotated[Optional[Path], typer.Option(help="Where models are kept for the next run.")] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(help="Where to put the picture.", metavar="PNG")] = None,  # noqa: UP045
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """The main job on real weights: fine-tune a small model on eight tasks, compress, merge with mergekit, compare."""
    try:
        from .demo import run_demo
    except ImportError as error:
        raise MissingExtraError(f'the demo needs more packages ({error}); pip install "tvbases-hf[demo]"') from error

    run_demo(workdir, json_file=json, plot=plot, quiet=quiet)


def _dtype(name: str) -> Any:
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    _check_choice("--dtype", name, known)
    return known[name]


def _check_choice(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ParameterError(f"{option}: {value!r} is unknown; choose one of {', '.join(known)}")


def _check_json(file: Path | None) -> None:
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise OutputError(f'--json "{file}": not a file in a directory that exists')


def _write_json(file: Path | None, value: dict[str, Any]) -> None:
    from .output import write_json, writing

    if file is not None:
        with writing(file):
            write_json(file, value)


def main() -> None:
    """Entry point. Only TvbasesError becomes a message; anything else is a defect of ours and shows its traceback."""
    try:
        app()
    except TvbasesError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
