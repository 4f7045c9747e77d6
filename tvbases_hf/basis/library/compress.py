"""From many adapters on disk to a library: what ``tvbases compress --method library`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...models.hosts import check_host
from ...storage.files import local_path
from ...storage.output import check_apart, check_output, preview, transaction
from ..info import BasisInfo, is_basis_directory
from ..request import Request
from .create import create
from .factors import open_factors
from .plan import make_plan
from .report import library_report


def compress_library(
    base: str | Path, tasks: Mapping[str, str | Path], out: str | Path, request: Request, dry_run: bool = False
) -> dict[str, Any]:
    """Write a library of the adapters, and report what it kept and what it cost; ``request`` as resolved."""
    check_output(out, is_basis_directory)
    check_apart(out, map(str, (base, *tasks.values())))
    check_host(request.host, {"r": 1})
    opened = open_factors(base, tasks)
    assert request.budget is not None
    needed = int(request.budget * opened.nbytes)
    if dry_run:
        return preview(out, None, needed) | {"warnings": _few(opened.warnings)}
    plan = make_plan(opened, request.budget, **request.options)
    options = {"budget": request.budget, **request.options}
    with transaction(out, is_basis_directory, needed) as work:
        info = create(plan, work, request.alpha, options)
    return library_report(info, Path(out)) | {
        "similarity_error": plan.similarity_error,
        "warnings": _few([*opened.warnings, *_twice(tasks), *_zero(info)]),
    }


def _twice(tasks: Mapping[str, str | Path]) -> list[str]:
    first: dict[str, str] = {}
    places = {task: str((local_path(source) or Path(source)).resolve()) for task, source in tasks.items()}
    again = {task: first[place] for task, place in places.items() if first.setdefault(place, task) != task}
    return [f'"{task}" is the same adapter as "{one}"; leave one of them out' for task, one in again.items()]


def _zero(info: BasisInfo) -> list[str]:
    assert info.library is not None
    found = [task for task, member in zip(info.tasks, info.library.members, strict=True) if not member.square_norm]
    return [f"{len(found)} adapters change nothing (first: {found[0]})"] if found else []


def _few(lines: list[str], most: int = 20) -> list[str]:
    """The first of many warnings, and how many more there are."""
    lines = list(dict.fromkeys(lines))
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} warnings more of this kind"]
