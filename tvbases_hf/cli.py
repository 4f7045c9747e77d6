"""The ``tvbases`` command: parse, call, print. Bad input is one message and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from tvbases_mergekit.hook import hook_app

from .errors import MissingExtraError, TvbasesError

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
def inspect(base: Base, task: Task, quiet: Quiet = False, json: Json = None) -> None:
    """How long and how similar task vectors are, how many bases they need, and whether the base is theirs."""
    from .gram import gram_matrix
    from .report import inspection, print_inspection, warn
    from .taskvector import TaskVectors, parse_tasks

    vectors = TaskVectors.open(base, parse_tasks(task))
    gram = gram_matrix(vectors, quiet=quiet)
    found = inspection(vectors, gram)
    warn(found["warnings"])
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
    num_bases: NumBases = 0.5,
    method: Annotated[str, typer.Option("--method", help="ae, pca or rand_select.")] = "ae",
    balance: Annotated[
        bool,
        typer.Option(help="ae: every task weighs the same in the sum of the bases (--no-balance: as in the paper)."),
    ] = True,
    solver: Annotated[str, typer.Option(help="ae: varpro (the optimum) or adam (the paper's recipe).")] = "varpro",
    seed: Annotated[int, typer.Option(help="ae, rand_select: which of equally good bases; which tasks.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Stored as: auto (the base's own), float32, bfloat16 or float16.")
    ] = "auto",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Replace T fine-tuned models by M vectors and a small decoder: a basis directory."""
    from .basis import Basis
    from .info import is_basis_directory
    from .output import check_output
    from .report import compression, print_compression, warn
    from .taskvector import TaskVectors, parse_tasks

    check_output(out, is_basis_directory)  # before the long reading, not after it
    options: dict[str, Any] = {
        "ae": {"balance": balance, "solver": solver, "seed": seed},
        "rand_select": {"seed": seed},
    }.get(method, {})
    vectors = TaskVectors.open(base, parse_tasks(task))
    from .gram import gram_matrix

    gram = gram_matrix(vectors, quiet=quiet)
    warn([*vectors.coverage.notes(), *gram.warnings()])
    built = Basis.build(vectors, num_bases, method=method, dtype=_dtype(dtype), gram=gram, **options)
    built.save_pretrained(out, quiet=quiet)
    found = compression(Basis.from_pretrained(out), vectors, gram, out)
    if not quiet:
        print_compression(found, console)
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

    from .errors import ParameterError

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ParameterError(f"unknown --dtype {name!r}; choose one of {', '.join(known)}")
    return known[name]


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
