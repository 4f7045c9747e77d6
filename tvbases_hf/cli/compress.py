"""``tvbases compress``: a basis directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import ParameterError
from .app import app, console
from .options import (
    Device,
    Json,
    Memory,
    OptionalBase,
    OptionalTask,
    Quiet,
    Resume,
    Threads,
    check_choice,
    check_json,
    parse_dtype,
    parse_targets,
    required,
    resources,
    write_report,
)

if TYPE_CHECKING:
    from ..basis import Basis
    from ..basis.adapters.compress import Request
    from ..models.vectors import Vectors


@app.command(
    epilog="Example: tvbases compress --base llama/ --task math=math/ --task code=code/ --num-bases 0.5 --out basis/"
)
def compress(
    context: typer.Context,
    new: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="--online: fine-tunes to add, named by the last part of their path.", metavar="[NEW]..."),
    ] = None,
    base: OptionalBase = None,
    task: OptionalTask = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="The basis directory to write.", metavar="DIR"),
    ] = None,
    online: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--online",
            help="Instead of --out: add the tasks to this directory, which holds --num-bases vectors however many "
            "come. Methods: ae, rand_select, and the running merges ta, magmax, ties, opcm.",
            metavar="DIR",
        ),
    ] = None,
    num_bases: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--num-bases",
            "-m",
            help="How many bases; a number below 1 is a fraction of the tasks. Left out: 0.5; cluster chooses.",
        ),
    ] = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--method",
            help="ae, pca, pca_positive, cluster, rand_select, tsv (truncated task vectors), joint (adapters: shared "
            "factors). "
            "Left out: ae; for adapters whatever loses least.",
        ),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option(help="ae: every task weighs the same in the sum of the bases (--no-balance: as in the paper)."),
    ] = True,
    even_errors: Annotated[
        bool, typer.Option("--even-errors", help="ae: reconstruct every task about as well; give none up.")
    ] = False,
    solver: Annotated[str, typer.Option(help="ae: varpro (the optimum) or adam (the paper's recipe).")] = "varpro",
    seed: Annotated[int, typer.Option(help="ae, cluster, rand_select: which of equally good bases; which tasks.")] = 0,
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="ae: how much a task weighs in the sum of the bases, others 1; repeat.", metavar="NAME=NUMBER"
        ),
    ] = None,
    inner: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="cluster: what a cluster becomes: mean (default), sum; checkpoints: ties, top_k, magmax, tsv."
        ),
    ] = None,
    split_below: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="cluster: split a cluster that holds a cosine below this (-0.3)."),
    ] = None,
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
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    resume: Resume = True,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Replace T fine-tuned models by M vectors and a small decoder: a basis directory.

    Of adapters, the directory is itself a LoRA that PEFT loads: the merged multi-task adapter. With --online tasks come
    one by one, and each is on disk when it is reported.
    """
    if online is not None:
        from .online import add_online

        return add_online(context)
    base, task, out = required("--base", base), required("--task", task), required("--out", out)
    if new:
        raise ParameterError(f"{new[0]}: plain paths go with --online; give --task NAME={new[0]}")
    from ..bases import CONSTRUCTIONS
    from ..bases.weights import resolve_num_bases
    from ..basis.adapters.compress import Request
    from ..basis.basis import METHODS, Basis
    from ..basis.info import is_basis_directory
    from ..basis.report import compression
    from ..models.gram import gram_matrix
    from ..models.vectors import Vectors, parse_tasks
    from ..storage.output import check_output
    from ..storage.run import find_device
    from .tables import print_compression, warn

    # Whatever can be wrong is found before the long reading, not after it.
    check_json(json)
    check_output(out, is_basis_directory)
    check_choice("--method", method or "ae", (*METHODS, "tsv", "joint"))
    CONSTRUCTIONS["ae"].checked({"solver": solver, "even_errors": even_errors, "balance": balance})
    if even_errors and (method or "ae") != "ae":
        raise ParameterError("--even-errors is of --method ae; add it, or leave --even-errors out")
    if method == "cluster":
        options = _cluster_options(inner, split_below, seed)
    elif inner is not None or split_below is not None:
        raise ParameterError("--inner and --split-below are of --method cluster; add it, or leave them out")
    else:
        options = {"balance": balance, "solver": solver, "seed": seed} | ({"even_errors": True} if even_errors else {})
    stored = parse_dtype(dtype)
    tasks = parse_tasks(task)
    resolve_num_bases(0.5 if num_bases is None else num_bases, len(tasks))
    targets = parse_targets(target or (), tasks)
    vectors = Vectors.open(base, tasks, device=find_device(device))
    _check_kind(vectors, method, options, alpha=alpha, targets=targets, memory=memory)
    if targets:
        options["target_weights"] = targets
    request = Request(method, budget, num_bases, rank, alpha, options)
    request = request.resolved(len(tasks)) if vectors.are_adapters else request
    with resources(threads, memory, resume):
        gram = gram_matrix(vectors)
        warn([*vectors.coverage.notes(), *gram.warnings()])
        built = _built(vectors, request, dtype=stored, gram=gram)
        built.save_pretrained(out)
        found = compression(Basis.from_pretrained(out), vectors, gram, out)
    if not quiet:
        print_compression(found, console)
    write_report(json, found)


def _cluster_options(inner: str | None, split_below: float | None, seed: int) -> dict[str, Any]:
    from ..bases import CONSTRUCTIONS
    from ..bases.cluster import SPLIT_BELOW
    from ..merging.apply import find_method

    options = {
        "inner": inner or "mean",
        "split_below": SPLIT_BELOW if split_below is None else split_below,
        "seed": seed,
    }
    CONSTRUCTIONS["cluster"].checked({name: options[name] for name in ("split_below", "seed")})
    if options["inner"] not in CONSTRUCTIONS["cluster"].options["inner"].choices:
        find_method(options["inner"])
    return options


def _check_kind(
    vectors: Vectors,
    method: str | None,
    options: Mapping[str, Any],
    *,
    alpha: float,
    targets: object,
    memory: str | None,
) -> None:
    """Adapters and full checkpoints do not take the same options."""
    from ..basis.basis import INNER

    adapters = vectors.are_adapters
    if adapters and vectors.device.type != "cpu":
        raise ParameterError("--device is for full checkpoints; factors of adapters are small: leave it out")
    if targets and ((method or "ae") != "ae" or (adapters and method is None)):
        raise ParameterError("--target is of --method ae; add it, or leave --target out")
    if not adapters and (method == "joint" or alpha != 1):
        raise ParameterError("--method joint and --alpha are for adapters; these are full checkpoints")
    if memory is not None and (adapters or method == "tsv" or options.get("inner", "mean") not in INNER):
        raise ParameterError(
            "--memory is kept by bases that are sums of full checkpoints; adapters, --method tsv and clusters that are "
            "merged by another method take whole tensors: leave it out"
        )


def _built(vectors: Vectors, request: Request, **how: Any) -> Basis:
    """``how`` is what all ways to build take: dtype, gram."""
    from ..basis import Basis

    if vectors.are_adapters:
        return Basis.of_adapters(vectors, request, **how)
    if request.method == "tsv":
        return Basis.truncate(vectors, request.rank, budget=request.budget, **how)
    method = request.method or "ae"
    number = 0.5 if request.num_bases is None and method != "cluster" else request.num_bases
    used = {"ae": request.options, "cluster": request.options, "rand_select": {"seed": request.options["seed"]}}
    return Basis.build(vectors, number, method=method, **how, **used.get(method, {}))
