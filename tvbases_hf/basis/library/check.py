"""Whether a library is whole, and whether it holds what it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...algebra.delta import LowRank
from ...algebra.products import inner
from ...errors import CheckpointError, ParameterError
from ...storage.run import track
from ..info import BasisInfo
from .factors import Opened, open_factors
from .vectors import LibraryVectors

# Errors are measured in float32: two measurements differ by so much of a task's norm.
SAME_ERROR = 2e-3


def verify_library(
    directory: str | Path,
    info: BasisInfo,
    base: str | Path | None = None,
    tasks: Mapping[str, str | Path] | None = None,
) -> dict[str, Any]:
    """Read every file, compare it with its checksum, and restore every task.

    Args:
        base, tasks: adapters to compare with: each must be as close to its task as the library says.

    Raises CheckpointError, naming the file or the task, for whatever is not as it should be.
    """
    source = LibraryVectors.open(Path(directory), info, str(directory))
    assert info.library is not None
    for one in track([*info.library.clusters, *info.library.members], "Checksums", unit=" files"):
        source.path_of(one)
    for place in track(range(len(info.tasks)), "Reading tasks", unit=" tasks"):
        source.task(place)
        _check_finite(source, info, place, str(directory))
    measured = _measured(source, info, base, tasks) if tasks else {}
    return {"out": str(directory), "tasks": list(info.tasks), "files": len(source.files), "measured": measured}


def check_base(info: BasisInfo, opened: Opened, label: str) -> None:
    """ParameterError for another base than the library's."""
    if opened.base.fingerprint() != info.base_fingerprint:
        raise ParameterError(
            f'"{opened.base.label}" is not the base of "{label}" ({info.base_id}): its fingerprint differs; give the '
            "same base, in the same dtype"
        )


def _check_finite(source: LibraryVectors, info: BasisInfo, place: int, label: str) -> None:
    name = source.names[0]
    change = source.change(name, place)
    if not bool(torch.isfinite(change.left).all() and torch.isfinite(change.right).all()):
        raise CheckpointError(f'"{label}": the change of {name} by "{info.tasks[place]}" is not finite; copy it again')


def _measured(
    source: LibraryVectors, info: BasisInfo, base: str | Path | None, tasks: Mapping[str, str | Path]
) -> dict[str, float]:
    """Relative errors against the adapters themselves."""
    if base is None:
        raise ParameterError("--task needs --base: adapters are read relative to it")
    opened, found = open_factors(base, tasks), {}
    check_base(info, opened, source.label)
    for one in opened.factors:
        place, lost, square = info.index(one.task), 0.0, 0.0
        for name in source.names:
            exact, kept = one.change(name) or LowRank.zeros(source.shape(name)), source.change(name, place)
            difference = LowRank(
                torch.cat([exact.left, -kept.left], dim=1).double(), torch.cat([exact.right, kept.right]).double()
            )
            lost += float(inner(difference, difference))
            square += float(inner(LowRank(exact.left.double(), exact.right.double()), exact))
        error = (max(0.0, lost) / square) ** 0.5 if square else 0.0
        if abs(error - info.task_error[place]) > SAME_ERROR:
            raise CheckpointError(
                f'"{one.task}" in the library is {error:.2%} from that adapter, and should be '
                f"{info.task_error[place]:.2%}; it was made of another one, or its file is another"
            )
        found[one.task] = error
    return found
