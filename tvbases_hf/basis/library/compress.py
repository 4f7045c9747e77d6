"""From many adapters on disk to a library: what ``tvbases compress --method library`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...models.hosts import check_host
from ...storage.output import check_apart, check_output, preview, transaction
from ..info import is_basis_directory
from ..request import Request
from .create import create
from .factors import open_factors
from .notes import few, notes
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
        return preview(out, None, needed) | {"warnings": few(opened.warnings)}
    plan = make_plan(opened, request.budget, **request.options)
    options = {"budget": request.budget, **request.options}
    with transaction(out, is_basis_directory, needed) as work:
        info = create(plan, work, request.alpha, options)
    return library_report(info, Path(out)) | {
        "similarity_error": plan.similarity_error,
        "warnings": few([*opened.warnings, *notes(info, set(tasks))]),
    }
