"""Tasks from disk into an online basis, in one call: what ``tvbases online`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..defaults import ExtraRows
from ..errors import ParameterError
from ..models.vectors import Vectors, open_model
from ..storage.output import preview
from .online import ONLINE, OnlineBasis


def add_tasks(
    out: str | Path,
    tasks: Mapping[str, str | Path],
    base: str | Path | None = None,
    num_bases: float | None = None,
    *,
    method: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    extra_rows: ExtraRows | None = None,
    dry_run: bool = False,
    added: Callable[[str, OnlineBasis], object] = lambda name, basis: None,
    **options: Any,
) -> dict[str, Any]:
    """Add tasks one by one to the online basis in ``out``, beginning it if there is none, and report what it holds.

    All models are opened and fitted to the base before the first is added.

    Args:
        base: needed for the first task; later where the base is no longer where it was.
        num_bases, method, dtype, seed, options: as in ``OnlineBasis.create``; of one that exists they may only repeat
            what it was begun with.
        extra_rows: of tasks whose vocabulary has more or fewer rows than the base's, which stays as it is; see
            models.vocabulary.
        dry_run: check everything but the numbers, and report what would be written.
        added: called for every task once it is on disk.
    """
    if not tasks:
        raise ParameterError("no task to add; give --task NAME=PATH, or the path of a checkpoint")
    given = {"num_bases": num_bases, "method": method, "dtype": dtype, "seed": seed, **options}
    basis = _opened(Path(out), base, {name: value for name, value in given.items() if value is not None})
    for name, path in tasks.items():
        if name in basis.tasks:
            raise ParameterError(f'a task named "{name}" is there already; give it another one: --task NAME={path}')
    opened = {name: {name: open_model(path, basis.base)} for name, path in tasks.items()}
    how: dict[str, Any] = {"extra_rows": extra_rows, "rows_of_base": True}
    models = {name: Vectors.of_models(basis.base, model, **how) for name, model in opened.items()}
    for model in models.values():
        model.base.check_storable()
    warnings = [note for model in models.values() for note in model.coverage.notes()]
    if dry_run:
        names = [info for info in basis.base.tensors.values() if info.dtype.is_floating_point]
        return preview(out, len(names), basis.stored_bytes(len(basis.tasks) + len(tasks))) | {"warnings": warnings}
    for name, model in models.items():
        basis.add(name, model.models[name])
        added(name, basis)
    return {**_report(basis), "warnings": warnings}


def _opened(directory: Path, base: str | Path | None, given: Mapping[str, Any]) -> OnlineBasis:
    if directory.is_dir() and any(directory.iterdir()):
        basis = OnlineBasis.open(directory, base)
        _check_same(basis, given)
        return basis
    if base is None:
        raise ParameterError(f'"{directory}" is new: give its base for the first task; later ones need it no more')
    return OnlineBasis.create(directory, base, **given)


def _check_same(basis: OnlineBasis, given: Mapping[str, Any]) -> None:
    settings = basis.settings
    known = {name: option.default for name, option in ONLINE[settings.method].items()} | settings.options
    known |= {"num_bases": settings.num_bases, "method": settings.method, "seed": settings.seed}
    known["dtype"] = settings.dtype or "auto"
    for name, value in given.items():
        said = str(value).removeprefix("torch.") if name == "dtype" else value
        if name not in known or said != known[name]:
            begun = f"{name} {known[name]}" if name in known else f"method {settings.method}, which has no {name}"
            raise ParameterError(
                f'"{basis.directory}" was begun with {begun}, which stays; leave the option out, or begin another '
                "directory"
            )


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
