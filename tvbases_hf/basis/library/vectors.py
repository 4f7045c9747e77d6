"""A library's vectors, which are its tasks, read from its files: each needs its own file and its cluster's."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algebra.delta import Delta, LowRank
from ...algebra.sums import total
from ...errors import CheckpointError
from ...models.finite import read_finite
from ...models.lora_config import CONFIG_FILE, read_config
from ...storage.checkpoint import Checkpoint, TensorInfo
from ...storage.slices import Slices
from ..adapters.codec import Spec
from ..adapters.lora_vectors import STOCK_FILE
from ..info import BasisInfo
from ..parts import Cluster, LibraryInfo, Member
from .packed import Packed, checksum, task_sizes

# Files that stay in memory: those of the clusters are used again and again, a task's until another is asked for.
KEPT_CLUSTERS, KEPT_TASKS = 4, 2


@dataclass(frozen=True)
class LibraryVectors:
    """A VectorSource over a library's directory. ``stock`` and ``config`` are the merged adapter that PEFT loads."""

    path: Path
    label: str
    library: LibraryInfo
    specs: Mapping[str, Spec]
    stock: Checkpoint
    config: Mapping[str, Any]
    alpha: float
    _clusters: OrderedDict[int, Packed] = field(default_factory=OrderedDict, compare=False)
    _tasks: OrderedDict[int, Packed] = field(default_factory=OrderedDict, compare=False)

    # What an adapter may have and a library does not hold; see LoraVectors.
    whole = ()
    scaled = ()

    @classmethod
    def open(cls, path: Path, info: BasisInfo, label: str) -> LibraryVectors:
        """Raises CheckpointError for a file that is not there; what is in them is read when it is asked for."""
        assert info.adapters is not None and info.library is not None
        files = [STOCK_FILE, *(one.file for one in (*info.library.clusters, *info.library.members))]
        here = {entry.name for entry in os.scandir(path)}
        if absent := [file for file in files if file not in here]:
            raise CheckpointError(
                f'"{label}": {len(absent)} of the {len(files)} files of the library are absent (first: {absent[0]}); '
                "copy or download it again"
            )
        stock = Checkpoint.open(path / STOCK_FILE, label=label)
        return cls(
            path, label, info.library, info.adapters.modules, stock, read_config(path, label), info.adapters.alpha
        )

    def of(self, info: BasisInfo) -> LibraryVectors:
        """The same directory as other lists have it: some of its clusters and tasks, with numbers of their own."""
        assert info.library is not None
        return replace(self, library=info.library, _clusters=OrderedDict(), _tasks=OrderedDict())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.specs)

    @property
    def files(self) -> list[str]:
        return [one.file for one in (*self.library.clusters, *self.library.members)]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Of all files, by file; of the stock adapter as they are called there."""
        found = dict(self.stock.tensors)
        for file in self.files:
            slices = Slices.open(self.path / file, self.label)
            found |= {f"{file}:{name}": info for name, info in slices.tensors.items()}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.specs[name].shape)

    def deltas(self, name: str) -> list[Delta]:
        return [self.change(name, task) for task in range(len(self.library.members))]

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        return []

    def scales(self, name: str) -> None:
        return None

    def change(self, name: str, task: int) -> LowRank:
        """One task's change of a weight, float32 factors: what it has in its cluster's directions, and beside them."""
        place, file = self._place(name), self.task(task)
        cluster = self.library.members[task].cluster
        shared = self.cluster(cluster) if cluster >= 0 else None
        parts = []
        if file.counts[place, 1].any():
            parts.append(LowRank(*_within(shared, place, file.stack(place, 0), file.stack(place, 1))))
        if file.counts[place, 3].any():
            parts.append(LowRank(file.stack(place, 2).T, file.stack(place, 3)))
        if not parts:
            return LowRank.zeros(self.shape(name))
        if len(parts) == 1:
            return parts[0]
        both = total(parts, [1.0, 1.0])
        assert isinstance(both, LowRank)
        return both

    def cluster(self, place: int) -> Packed:
        """The directions that a cluster shares."""
        return _kept(self._clusters, KEPT_CLUSTERS, place, lambda: self.open_cluster(place))

    def open_cluster(self, place: int) -> Packed:
        """The same, read anew."""
        return Packed.open(self.path_of(self.library.clusters[place]), self.label, self.cluster_sizes)

    def task(self, place: int) -> Packed:
        member = self.library.members[place]
        shared = self.cluster(member.cluster).counts if member.cluster >= 0 else None

        def read() -> Packed:
            return Packed.open(self.path_of(member), self.label, task_sizes(shared, self._shapes))

        return _kept(self._tasks, KEPT_TASKS, place, read)

    def path_of(self, one: Cluster | Member) -> Path:
        """The path of a file that is what was written; CheckpointError for another."""
        if checksum(self.path / one.file) != one.checksum:
            raise CheckpointError(
                f'"{self.label}": {one.file} is not the file that was written; copy the library again'
            )
        return self.path / one.file

    def check_files(self) -> None:
        """CheckpointError for a file that is cut off, by the headers of all."""
        for file in self.files:
            Slices.open(self.path / file, self.label)

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        """The same files; basis_config.json and the card are the caller's."""
        carry(self.path, directory, [*self.files, STOCK_FILE, CONFIG_FILE])
        return info

    def read_stock(self) -> dict[str, Tensor]:
        return {name: read_finite(self.stock, name) for name in self.stock.tensors}

    def _place(self, name: str) -> int:
        return list(self.specs).index(name)

    @property
    def cluster_sizes(self) -> Tensor:
        """[weights, 2] lengths of shared directions."""
        return torch.tensor(self._shapes, dtype=torch.int64)

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        return [(spec.shape[0], spec.shape[1]) for spec in self.specs.values()]


def _within(shared: Packed | None, place: int, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """[n, K] and [K, m] of a core between the shared directions of a weight; ``first`` and ``last`` are its rows."""
    left = shared.stack(place, 0) if shared is not None else torch.empty(0, 0)
    right = shared.stack(place, 1) if shared is not None else torch.empty(0, 0)
    inner = last @ right if len(right) else last
    if not len(left):
        return first.T, inner
    return (left.T[:, : len(last)] if len(right) else left.T @ first.T), inner


def _kept(kept: OrderedDict[int, Packed], most: int, key: int, read: Any) -> Packed:
    """From memory, or read, and then something else forgotten."""
    found = kept.get(key)
    if found is None:
        found = kept[key] = read()
        while len(kept) > most:
            kept.popitem(last=False)
    else:
        kept.move_to_end(key)
    return found


def carry(source: Path, target: Path, files: Iterable[str]) -> None:
    """The same files in another directory: by another name of theirs, where the file system can, else by copies.

    No file of a library is ever written to again, so that two directories may hold the very same one.
    """
    for file in files:
        try:
            os.link(source / file, target / file)
        except OSError:
            shutil.copyfile(source / file, target / file)
