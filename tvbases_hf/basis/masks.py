"""Every task as one bit an entry over one vector of all: EMR (arXiv 2405.17461) and TALL masks (arXiv 2405.07813).

A task is restored as published, scale_t * mask_t * unified. Stored are, by weight, the unified vector ``name``
[1, *shape] and the packed masks ``name.task_masks`` [T, ceil(entries / 8)] uint8, whose first entry is the highest
bit; the scales are among the options in basis_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.blocks import blocks
from ..algebra.delta import Delta, Dense
from ..bases import BasisWeights
from ..errors import CheckpointError, ParameterError
from ..models.finite import read_finite
from ..models.gram import Gram
from ..models.vectors import Vectors
from ..options import Option
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.run import track
from ..storage.tensor_files import TensorFiles
from .info import VECTORS_STEM, BasisInfo, describe

if TYPE_CHECKING:
    from pathlib import Path

METHOD, MASK, SCALES = "masks", ".task_masks", "scales"
MASK_OPTIONS: Mapping[str, Option] = {
    option.name: option
    for option in (
        Option(
            "unified",
            Annotated[
                Literal["emr", "tall"],
                Field(
                    description="emr: the largest entries with the elected sign, and a scale per task; tall: the sum"
                ),
            ],
            "emr",
        ),
        Option(
            "needed",
            Annotated[
                float,
                Field(
                    gt=0,
                    description="tall: an entry belongs to a task if it is at least this share of what the others add",
                ),
            ],
            0.4,
        ),
    )
}


@dataclass(frozen=True)
class MaskedVectors:
    """The tasks' vectors under their masks, made from the task vectors when they are asked for."""

    vectors: Vectors
    unified: str
    needed: float
    dtype: torch.dtype | None
    scales: Sequence[float]

    @property
    def names(self) -> tuple[str, ...]:
        return self.vectors.names

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return _tensors(self.vectors, self.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.vectors.base.tensors[name].shape

    def deltas(self, name: str) -> list[Delta]:
        return _restored(*self.parts(name), self.scales, self.shape(name))

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        return []

    def parts(self, name: str) -> tuple[Tensor, Tensor]:
        """The unified vector [n] as it is stored, and the masks [T, n] bool, of one weight."""
        dtype, found = self.tensors[name].dtype, []
        for values in blocks(self.vectors.deltas(name)):
            vector, masks = unified_and_masks(values, self.unified, self.needed)
            found.append((vector.to(dtype), masks))
        vector, masks = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found], dim=1)
        if not torch.isfinite(vector).all():
            raise ParameterError(f"tensor {name} overflows {dtype}; store it as bfloat16 or float32")
        return vector.cpu(), masks.cpu()

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        files = TensorFiles(directory, VECTORS_STEM, self.tensors)
        for name in track(self.names, "Writing masks", lambda n: self.vectors.base.tensors[n].nbytes):
            vector, masks = self.parts(name)
            files.write(name, vector)
            files.write(name + MASK, packed(masks))
        return info


@dataclass(frozen=True)
class StoredMasks:
    """The same, read back from the files of a basis directory."""

    checkpoint: Checkpoint
    scales: Sequence[float]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.checkpoint.tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if not name.endswith(MASK))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape[1:]

    def deltas(self, name: str) -> list[Delta]:
        """Raises CheckpointError for NaN and infinity."""
        vector = read_finite(self.checkpoint, name).reshape(-1)
        return _restored(
            vector, unpacked(self.checkpoint.read(name + MASK), len(vector)), self.scales, self.shape(name)
        )

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        return []

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        files = TensorFiles(directory, VECTORS_STEM, self.tensors)
        for name in track(list(self.tensors), "Writing", lambda n: self.tensors[n].nbytes):
            files.write(name, self.checkpoint.read(name) if name.endswith(MASK) else read_finite(self.checkpoint, name))
        return info

    @classmethod
    def open(cls, path: Path, info: BasisInfo, label: str) -> StoredMasks:
        """CheckpointError unless every weight has a mask of its size for each task, and every task a scale."""
        scales, found = info.options.get(SCALES), Checkpoint.open(path)
        given = scales if isinstance(scales, list) else []
        if len(given) != len(info.tasks) or not all(isinstance(scale, int | float) for scale in given):
            raise CheckpointError(f'"{label}": options.{SCALES} does not hold a number for each of the tasks')
        source = cls(found, [float(scale) for scale in given])
        masks = {name: info for name, info in found.tensors.items() if name.endswith(MASK)}
        for name in source.names:
            held, mask = found.tensors[name], masks.pop(name + MASK, None)
            wanted = TensorInfo((len(given), math.ceil(held.numel / 8)), torch.uint8)
            if held.shape[:1] != (1,) or not held.dtype.is_floating_point or mask != wanted:
                raise CheckpointError(f'"{label}": {name} does not hold a vector and a mask for each of the tasks')
        if masks:
            raise CheckpointError(f'"{label}": {next(iter(masks))} is the mask of no vector')
        return source


def masked(
    vectors: Vectors, gram: Gram, options: Mapping[str, Any], dtype: torch.dtype | None
) -> tuple[BasisInfo, MaskedVectors]:
    """One pass over the models for the scales, which are those of the whole model, and the errors as stored."""
    given = {name: options.get(name, option.default) for name, option in MASK_OPTIONS.items()}
    source = MaskedVectors(vectors, given["unified"], given["needed"], dtype, [1.0] * len(vectors))
    sums = torch.zeros(4, len(vectors), dtype=torch.float64)  # |tau|_1, |kept|_1, <tau, kept>, |kept|^2
    for name in track(vectors.names, "Masks", lambda n: vectors.base.tensors[n].nbytes):
        vector, masks = source.parts(name)
        start = 0
        for values in blocks(vectors.deltas(name)):
            part = slice(start, start + values.shape[1])
            values, kept = values.cpu(), masks[:, part] * vector[part].double()
            sums += torch.stack([values.abs().sum(1), kept.abs().sum(1), (values * kept).sum(1), kept.square().sum(1)])
            start = part.stop
    own, kept, along, square = sums
    scales = torch.ones_like(own)
    if given["unified"] == "emr":
        scales = torch.where(kept > 0, own / kept.clamp_min(torch.finfo(torch.float64).tiny), scales)
    lost = (gram.matrix.diagonal() - 2 * scales * along + scales.square() * square).clamp_min(0)
    identity, loss = torch.eye(len(vectors), dtype=torch.float64), float(lost.sum())
    weights = BasisWeights(METHOD, identity, identity, loss, loss, loss, total=float(gram.matrix.trace()))
    source = MaskedVectors(vectors, given["unified"], given["needed"], dtype, scales.tolist())
    return describe(vectors, gram, weights, {**given, SCALES: scales.tolist()}).with_errors(lost), source


def unified_and_masks(values: Tensor, unified: str, needed: float) -> tuple[Tensor, Tensor]:
    """From the tasks' entries [T, k]: the unified ones [k], and which of them each task keeps, [T, k] bool.

    ``emr``: the sign of the sum, with the largest magnitude among the tasks of that sign; a task keeps what has its own
    sign. ``tall``: the sum; a task keeps what is at least ``needed`` times what the others add, |tau_t| >= needed
    |sum - tau_t|.
    """
    total = values.sum(dim=0)
    if unified == "tall":
        return total, values.abs() >= needed * (total - values).abs()
    signs = total.sign()
    agree = values * signs > 0
    return signs * (values.abs() * agree).amax(dim=0), agree


def packed(masks: Tensor) -> Tensor:
    """[T, ceil(n / 8)] uint8 of bool [T, n]; the first entry is the highest bit, the last byte filled with zeros."""
    filled = torch.nn.functional.pad(masks.to(torch.uint8), (0, -masks.shape[1] % 8))
    return (filled.reshape(len(masks), -1, 8) << _shifts()).sum(dim=2, dtype=torch.uint8)


def unpacked(masks: Tensor, count: int) -> Tensor:
    """[T, count] bool, the inverse of ``packed``."""
    return ((masks[:, :, None] >> _shifts()) & 1).bool().reshape(len(masks), -1)[:, :count]


def _shifts() -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8)


def _restored(vector: Tensor, masks: Tensor, scales: Sequence[float], shape: Sequence[int]) -> list[Delta]:
    """float32, as a task's own scale need not be a number of the stored dtype."""
    return [
        Dense((scale * vector.float() * mask).reshape(tuple(shape))) for scale, mask in zip(scales, masks, strict=True)
    ]


def _tensors(vectors: Vectors, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for name in vectors.names:
        base = vectors.base.tensors[name]
        found[name] = TensorInfo((1, *base.shape), dtype or base.dtype)
        found[name + MASK] = TensorInfo((len(vectors), math.ceil(base.numel / 8)), torch.uint8)
    return found
