"""One merge: the task vectors, what is done to each weight, and what a reader of the result is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.blocks import PIECE_BYTES, pieces
from ..algebra.delta import Delta, Dense
from ..algebra.finite import is_finite
from ..algebra.sums import scale, total
from ..algebra.tall import bytes_by_rows, is_tall
from ..errors import ParameterError
from ..models.gram import not_finite
from ..models.vectors import Vectors
from ..storage.cards import CARD
from ..storage.checkpoint import Checkpoint
from ..storage.json_files import read_json
from ..storage.output import files_in, write_json
from ..version import library_version
from .changes import Made, digest

MARKER = "tvbases_merge.json"
# Where a method needs whole tensors: how many float32 ones a thread holds beside one per model.
WHOLE_AT_ONCE, BYTES = 5, 4


# The flattened merged change of one weight in consecutive pieces, from the models' changes in full.
Stream = Callable[[str, Sequence[Dense]], Iterator[Tensor]]


@dataclass(frozen=True)
class Merge:
    """``combine(name, changes)`` is a merging method with the parameters that it has for the weight ``name``.

    ``names`` are the weights that it may change; all others stay as the base has them. ``method`` and ``recipe`` (the
    text of a configuration) are for the reader. ``stream`` is the same method for full checkpoints, where it can do
    with a piece of every model in memory.
    """

    vectors: Vectors
    combine: Callable[[str, Sequence[Delta]], Delta]
    names: tuple[str, ...]
    method: str
    recipe: str
    stream: Stream | None = None
    seed: int = 0
    by_rows: bool = False
    """Whether of tall matrices a block of rows is in memory (see methods.registry)."""
    tokenizer: Mapping[str, Path | bytes] | None = None
    """Files of a tokenizer, or a chat template, that were made for the result; None for the models' own."""

    @classmethod
    def of(cls, made: Made, recipe: str = "") -> Merge:
        """What a method has made of vectors, as it is.

        A digest of the change is added to the recipe (one pass over it): a killed merge goes on only if it is the same.
        """
        if made.made_of is None:
            raise ParameterError(f"of which vectors {made.method} was made is not known; set made_of to them")
        recipe = f"{recipe}# change {digest(made)}\n"
        return cls(made.made_of, lambda name, _: made.change(name), made.names, made.method, recipe)

    def scaled(self, factor: float) -> Merge:
        """The merge with ``factor`` times its change."""
        combine, stream = self.combine, self.stream

        def pieces(name: str, deltas: Sequence[Dense]) -> Iterator[Tensor]:
            assert stream is not None
            return (factor * piece for piece in stream(name, deltas))

        return replace(
            self,
            combine=lambda name, deltas: scale(combine(name, deltas), factor),
            stream=None if stream is None else pieces,
            recipe=f"{self.recipe}# the merged change times {factor!r}\n",
        )

    def summing(self, vectors: Vectors, alphas: Sequence[float]) -> Merge:
        """The sum of alphas times ``vectors`` over the same models, in place of what the method makes of them."""
        scales = [float(alpha) for alpha in alphas]
        return replace(
            self,
            combine=lambda name, _: total(vectors.deltas(name), scales),
            stream=None,
            recipe=f"{self.recipe}# the sum of its vectors times {', '.join(map(repr, scales))}\n",
        )

    @property
    def base(self) -> Checkpoint:
        return self.vectors.base

    def change(self, name: str) -> Delta:
        """The merged change of one weight."""
        return self.combine(name, self.inputs(name))

    def inputs(self, name: str) -> list[Delta]:
        """The models' changes of one weight. CheckpointError for NaN or infinity in one of them."""
        deltas = self.vectors.deltas(name)
        if not all(is_finite(tensor) for delta in deltas for tensor in delta.stored):
            raise not_finite(self.vectors, name, deltas)
        return deltas

    def pieces(self, name: str) -> Iterator[Tensor]:
        """What the merge adds to one weight of the base, flattened, in consecutive pieces.

        CheckpointError for NaN or infinity in the models, or for a sum that overflows.
        """
        deltas = self.vectors.deltas(name)
        whole = [delta for delta in deltas if isinstance(delta, Dense)]
        if self.stream is None or len(whole) < len(deltas):
            yield from pieces(self.change(name))
            return
        for part in self.stream(name, whole):
            if not is_finite(part):
                raise not_finite(self.vectors, name, deltas)
            yield part

    def need(self, name: str) -> int:
        """About the bytes that are in memory while a weight is merged."""
        if name not in self.names:
            return 0
        if self.stream is not None and not self.vectors.are_adapters:
            return PIECE_BYTES + self.vectors.copied(name)
        whole = whole_bytes(len(self.vectors), self.vectors.base.tensors[name].shape, self.by_rows)
        return whole + self.vectors.copied(name)

    def job(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """Whatever decides the output: the same job can go on where a killed one was."""
        models = {task: model.fingerprint() for task, model in self.vectors.models.items()}
        return {
            "recipe": self.recipe,
            "seed": self.seed,
            "dtype": str(dtype),
            "rows": self.vectors.coverage.rows,
            "base": self.vectors.base.fingerprint(),
            "models": models,
            "version": library_version(),
        }

    def report(self, kind: str, out: Path) -> dict[str, Any]:
        """What is known of every merge."""
        base = self.vectors.base
        return {
            "out": str(out),
            "kind": kind,
            "method": self.method,
            "base": base.label,
            "models": list(self.vectors.tasks),
            "tensors": len(base.tensors),
            "changed": len(self.names),
            "missing": {task: len(names) for task, names in self.vectors.coverage.missing.items()},
            "warnings": self.vectors.coverage.notes(),
        }


def whole_bytes(models: int, shape: Sequence[int], by_rows: bool = False) -> int:
    """About the bytes that a method takes of a weight that it merges as a whole, or where it can by its rows."""
    if by_rows and is_tall(shape):
        return bytes_by_rows(models, shape[1])
    return (models + WHOLE_AT_ONCE) * math.prod(shape) * BYTES


def leave_marker(directory: Path, report: dict[str, Any]) -> None:
    """The report, and the names of all files with the card's: what the next merge may replace."""
    files = sorted({*files_in(directory), MARKER, CARD})
    write_json(directory / MARKER, {**report, "files": files})


def is_merge(directory: Path) -> bool:
    """Whether a directory holds a merge and nothing that was put there since."""
    file = directory / MARKER
    try:
        written = set(read_json(file)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return set(files_in(directory)) <= written
