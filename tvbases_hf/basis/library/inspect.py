"""What is in a library: near copies, clusters and what they share, and what a byte buys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...storage.run import track
from ..info import BasisInfo
from .report import library_report
from .vectors import LibraryVectors

# Tasks with a cosine above this are near copies: what a second training run of the same data is not.
NEAR_COPY = 0.98
COMPARED_WEIGHTS = 6
# Rows of stored factors that are compared at once.
BLOCK = 4096


def inspect_library(directory: str | Path, info: BasisInfo) -> dict[str, Any]:
    """As plain numbers: the report, the clusters with what they share, near copies, the curve of error and bytes."""
    source = LibraryVectors.open(Path(directory), info, str(directory))
    assert info.library is not None
    return library_report(info, Path(directory)) | {
        "cluster_members": _members(info),
        "shared_directions": [_shared(source, place) for place in range(len(info.library.clusters))],
        "near_copies": _near_copies(source, info),
        "curve": [{"bytes": row[0], "error": row[1]} for row in info.library.curve],
    }


def _members(info: BasisInfo) -> list[list[str]]:
    assert info.library is not None
    members = list(zip(info.tasks, info.library.members, strict=True))
    return [
        [task for task, member in members if member.cluster == place] for place in range(len(info.library.clusters))
    ]


def _shared(source: LibraryVectors, cluster: int) -> dict[str, float]:
    """The mean number of output and input directions that a cluster shares per weight, and their bits per number."""
    counts = source.cluster(cluster).counts.double()
    rows = counts.sum((0, 2))
    bits = (counts * torch.tensor([16.0, 8.0, 4.0])).sum() / counts.sum().clamp_min(1)
    weights = len(counts)
    return {"outputs": float(rows[0]) / weights, "inputs": float(rows[1]) / weights, "bits": float(bits)}


def _near_copies(source: LibraryVectors, info: BasisInfo) -> list[dict[str, Any]]:
    """Pairs of tasks that are nearly the same, by the cosine over some weights."""
    count, step = len(info.tasks), max(1, len(source.names) // COMPARED_WEIGHTS)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for name in track(source.names[::step], "Comparing tasks", unit=" weights"):
        gram += _gram([source.change(name, task) for task in range(count)])
    size = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    cosine = gram / size[:, None] / size[None, :]
    pairs = (cosine.triu(1) > NEAR_COPY).nonzero().tolist()
    return [{"tasks": [info.tasks[a], info.tasks[b]], "cosine": float(cosine[a, b])} for a, b in pairs]


def _gram(changes: list[LowRank]) -> Tensor:
    """[T, T] inner products, a block of rows at a time: their factors side by side, O(T^2 r^2 (n + m))."""
    owner = torch.repeat_interleave(torch.arange(len(changes)), torch.tensor([change.rank for change in changes]))
    found = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    if not len(owner):
        return found
    left, right = torch.cat([c.left for c in changes], dim=1), torch.cat([c.right for c in changes])
    for start in range(0, len(owner), BLOCK):
        part = (left[:, start : start + BLOCK].T @ left) * (right[start : start + BLOCK] @ right.T)
        summed = torch.zeros(len(part), len(changes)).index_add_(1, owner, part)
        found.index_add_(0, owner[start : start + BLOCK], summed.double())
    return found
