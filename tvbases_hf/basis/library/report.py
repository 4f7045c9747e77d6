"""What a library holds and what it costs, as plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...storage.slices import Slices
from ..info import BasisInfo


def library_report(info: BasisInfo, directory: Path) -> dict[str, Any]:
    """Of a library as it is on disk; ``bytes`` are those of its numbers, ``directory_bytes`` those of all its files."""
    assert info.adapters is not None and info.library is not None
    library = info.library
    sizes = {file.name: _numbers(file) for file in directory.glob("*.safetensors")}
    used = sum(sizes.values())
    whole = sum(member.nbytes for member in library.members)
    return {
        "out": str(directory),
        "method": info.method,
        "base": info.base_id,
        "alpha": info.adapters.alpha,
        "stock_error": info.adapters.stock_error,
        "tasks": list(info.tasks),
        "task_error": list(info.task_error),
        "task_bytes": [sizes.get(member.file, 0) for member in library.members],
        "task_cluster": [member.cluster for member in library.members],
        "task_rank": [member.rank for member in library.members],
        "clusters": len(library.clusters),
        "mean_square_error": sum(error**2 for error in info.task_error) / max(1, len(info.tasks)),
        "bytes": used,
        "directory_bytes": sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        "bytes_of_task_vectors": whole,
        "share": used / whole if whole else 0.0,
    }


def _numbers(file: Path) -> int:
    """What the tensors of a file take."""
    return sum(info.nbytes for info in Slices.open(file, str(file)).tensors.values())
