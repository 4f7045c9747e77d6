"""``tvbases compress --online``: one more task, or several, into a basis of a fixed number of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ParameterError
from .app import console
from .options import check_json, parse_dtype, write_report

if TYPE_CHECKING:
    from ..basis.online import OnlineBasis

# Options of compress that an online basis has, and those that it keeps from its first task on.
SHARED = ("online", "new", "base", "task", "quiet", "json")
FIXED = ("num_bases", "method", "balance", "solver", "seed", "dtype")


def add_online(context: typer.Context) -> None:
    """Create the basis if there is none, then add the tasks one by one; each is told when it is on disk."""
    from .tables import warn

    given = _given(context)
    chosen = context.params
    check_json(chosen["json"])
    tasks = _tasks(chosen["task"] or (), chosen["new"] or ())
    basis = _opened(Path(chosen["online"]), chosen["base"], given)
    for name, path in tasks.items():
        if name in basis.tasks:
            raise ParameterError(f'a task named "{name}" is there already; give it another one: --task NAME={path}')
    models = {name: _checked(basis, name, path) for name, path in tasks.items()}
    for model in models.values():
        warn(model.coverage.notes())
    for name, model in models.items():
        basis.add(name, model.models[name])
        if not chosen["quiet"]:
            held = f"{_count(len(basis.tasks), 'task')} in {_count(len(basis.weights), 'vector')}"
            console.print(f"{name} added: {held} ({basis.settings.method})")
    found = _report(basis)
    if not chosen["quiet"]:
        _print(found)
    write_report(chosen["json"], found)


def _given(context: typer.Context) -> dict[str, Any]:
    """What the user set of the options that are fixed with the first task; ParameterError for one it does not have."""
    set_by_user = [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    other = [name for name in set_by_user if name not in (*SHARED, *FIXED)]
    if other:
        raise ParameterError(f"--{other[0].replace('_', '-')} does not go with --online; leave it out")
    return {name: context.params[name] for name in set_by_user if name in FIXED}


def _tasks(named: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """``--task NAME=PATH`` and plain paths, which are named by their last part."""
    from ..models.vectors import parse_tasks

    tasks = parse_tasks([*named, *(f"{Path(path).name}={path}" for path in paths)])
    if not tasks:
        raise ParameterError("no task to add; give --task NAME=PATH, or the path of a checkpoint")
    return tasks


def _opened(directory: Path, base: str | None, given: Mapping[str, Any]) -> OnlineBasis:
    from ..basis.online import OnlineBasis

    if directory.is_dir() and any(directory.iterdir()):
        basis = OnlineBasis.open(directory, base)
        _check_same(basis, given)
        return basis
    if base is None:
        raise ParameterError(f'"{directory}" is new: give --base for its first task; later ones need it no more')
    options = {name: given[name] for name in ("balance", "solver") if name in given}
    method, number = given.get("method") or "ae", given.get("num_bases")
    stored = parse_dtype(given.get("dtype", "auto"))
    return OnlineBasis.create(
        directory, base, number, method=method, dtype=stored, seed=given.get("seed", 0), **options
    )


def _check_same(basis: OnlineBasis, given: Mapping[str, Any]) -> None:
    settings = basis.settings
    known: dict[str, Any] = {
        "num_bases": settings.num_bases,
        "method": settings.method,
        "seed": settings.seed,
        "dtype": settings.dtype or "auto",
        "balance": settings.options.get("balance", True),
        "solver": settings.options.get("solver", "varpro"),
    }
    for name, value in given.items():
        if value != known[name]:
            raise ParameterError(
                f'"{basis.directory}" was begun with --{name.replace("_", "-")} {known[name]}, which stays; '
                "leave the option out, or begin another directory"
            )


def _checked(basis: OnlineBasis, name: str, path: str) -> Any:
    """The task vectors of one model, so that all models fit before the first is added."""
    from ..models.vectors import Vectors, open_model

    return Vectors.of_models(basis.base, {name: open_model(path, basis.base)})


def _report(basis: OnlineBasis) -> dict[str, Any]:
    info, buffer = basis.basis.info, basis.buffer
    return {
        "out": str(basis.directory),
        "method": info.method,
        "tasks": list(info.tasks),
        "num_bases": buffer.size,
        "budget": basis.settings.num_bases,
        "weights": basis.weights,
        "effective_weights": (buffer.encoder @ buffer.weights).tolist(),
        "task_error_estimate": basis.estimated_errors,
        "task_error_at_most": list(info.task_error),
        "bytes": sum(tensor.nbytes for tensor in basis.basis.tensors.values()),
    }


def _print(found: Mapping[str, Any]) -> None:
    from rich.table import Table

    from ..storage.output import readable_size

    table = Table("task", "weight in the merged vector", "error, about", "at most")
    columns = ("tasks", "effective_weights", "task_error_estimate", "task_error_at_most")
    for task, weight, about, most in zip(*(found[name] for name in columns), strict=True):
        table.add_row(task, f"{weight:.3f}", f"{about:.1%}", f"{most:.1%}")
    console.print(table)
    room = found["budget"] - found["num_bases"]
    console.print(
        f"{found['out']}: {_count(found['num_bases'], 'vector')}, {readable_size(found['bytes'])}"
        + (f"; room for {room} more" if room else "; full: the next task compresses it")
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
