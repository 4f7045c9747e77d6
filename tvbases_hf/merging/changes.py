"""A change for every weight of a base that changes: what is evaluated in place, and what ``merging.write`` writes.

A ``Merge`` is one, an ``Edit`` (a direction to negate, a task restored from a basis) and what a method that learns from
data gives back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..algebra.blocks import PIECE_BYTES, pieces
from ..algebra.delta import Delta, Dense
from ..algebra.sums import scale
from ..models.vectors import Model, Vectors
from ..storage.cards import CARD
from ..storage.checkpoint import Checkpoint
from ..storage.model import MARKER
from ..storage.output import files_in, write_json


class Changes(Protocol):
    """``change(name)`` of every weight in ``names``; all others stay as the base has them."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def change(self, name: str) -> Delta: ...


class Made(Changes, Protocol):
    """Changes that a method, called ``method``, made of some vectors; None where nobody has said of which."""

    @property
    def made_of(self) -> Vectors | None: ...

    @property
    def method(self) -> str: ...


@dataclass(frozen=True)
class Edit:
    """alpha * ``read(name)``, added to ``base``; ``note`` says in one line what that is.

    ``stream`` gives the pieces of alpha * read(name) where they need not exist as a whole. ``models`` are what the
    change was made of: it can be written as an adapter if they are adapters.
    """

    base: Checkpoint
    names: tuple[str, ...]
    read: Callable[[str], Delta | Tensor]
    note: str
    alpha: float = 1.0
    models: Mapping[str, Model] = field(default_factory=dict)
    stream: Callable[[str], Iterator[Tensor]] | None = None

    @classmethod
    def of(cls, vectors: Vectors, read: Callable[[str], Delta | Tensor], note: str, alpha: float = 1.0) -> Edit:
        """``alpha`` times a change that was made of vectors; below 0 it is forgotten."""
        return cls(vectors.base, vectors.names, read, note, alpha, vectors.models)

    def change(self, name: str) -> Delta:
        return scale(self._read(name), self.alpha)

    def pieces(self, name: str) -> Iterator[Tensor]:
        return pieces(self._read(name), self.alpha) if self.stream is None else self.stream(name)

    def need(self, name: str) -> int:
        """About the bytes that are in memory while a weight is changed, of quantised models."""
        read = [model for model in self.models.values() if isinstance(model, Checkpoint) and name in model.tensors]
        copies = sum(model.copied(name) for model in (self.base, *read)) if read and name in self.names else 0
        return copies + PIECE_BYTES if copies else 0

    def leave_marker(self, directory: Path) -> None:
        """What was edited, and the names of all files: what the next edit may replace."""
        files = sorted({*files_in(directory), MARKER, CARD})
        found = {"base": self.base.label, "edit": self.note, "files": files}
        write_json(directory / MARKER, found)

    def _read(self, name: str) -> Delta:
        found = self.read(name)
        return Dense(found) if isinstance(found, Tensor) else found


@dataclass(frozen=True)
class Computed:
    """Changes that ``method`` computed whole: ``tensors`` holds one of each weight's shape, float32 at least.

    ``report`` says what a reader of the result should know of it.
    """

    made_of: Vectors
    method: str
    tensors: Mapping[str, Tensor]
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def change(self, name: str) -> Delta:
        return Dense(self.tensors[name])


def digest(changes: Changes) -> str:
    """Of all numbers of the change."""
    found = hashlib.sha256()
    for name in changes.names:
        found.update(name.encode())
        for part in pieces(changes.change(name)):
            found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()[:32]
