"""Where a basis's vectors come from: made from task vectors on demand, or mapped from files; and how they are written.

A vector's part of one weight is a Delta. Dense parts of all vectors are stored as one tensor ``name`` [rows, *shape];
low-rank ones side by side as ``name.left`` [n, R] and ``name.right`` [R, m], R the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..algebra.blocks import ENCODE_BYTES, blocks
from ..algebra.delta import Delta, Dense, LowRank, dense, low_parts
from ..algebra.linalg import GRAM_CUTOFF, solve_psd
from ..algebra.svd import svd
from ..bases import BasisWeights
from ..errors import CheckpointError, ParameterError
from ..models.finite import read_finite
from ..models.vectors import Vectors
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.parallel import written
from ..storage.run import track
from ..storage.tensor_files import TensorFiles
from .info import VECTORS_STEM, BasisInfo

LEFT, RIGHT = ".left", ".right"
Ranks = Mapping[str, Sequence[int]]


class VectorSource(Protocol):
    """The vectors of a basis: ``deltas`` gives one weight's, ``write`` puts all into files."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What is stored, by stored name."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that the vectors cover."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one vector's part of a weight; [n, m] where it is kept in factors."""
        ...

    def deltas(self, name: str) -> list[Delta]: ...

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        """What one task changes in a weight beside the vectors' part; empty where it shares all with them.

        ``base`` is read where such a change is relative to it (DoRA).
        """
        ...

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        """Write all vectors; return the info with decoder and errors as they are after rounding."""
        ...


@dataclass(frozen=True)
class EncodedVectors:
    """Sums of task vectors, T @ encoder; computed block by block, never held as a whole."""

    vectors: Vectors
    encoder: Tensor
    dtype: torch.dtype | None
    has_mean: bool

    @property
    def names(self) -> tuple[str, ...]:
        return self.vectors.names

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        rows, base = self.encoder.shape[1], self.vectors.base.tensors
        return {name: TensorInfo((rows, *base[name].shape), self.dtype or base[name].dtype) for name in self.names}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.vectors.base.tensors[name].shape

    def deltas(self, name: str) -> list[Delta]:
        info, start = self.tensors[name], 0
        sums = torch.empty(info.shape[0], info.numel // info.shape[0], dtype=info.dtype)
        for part in blocks(self.vectors.deltas(name)):
            sums[:, start : start + part.shape[1]] = self.encoder.T.to(part.device) @ part
            start += part.shape[1]
        return [Dense(row) for row in sums.reshape(info.shape)]

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        return []

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        size, count = self.encoder.shape[1], len(self.vectors)
        base, tensors = self.vectors.base.tensors, self.tensors
        files = TensorFiles(directory, VECTORS_STEM, tensors)

        def write(name: str) -> list[float]:
            products = torch.zeros(size, size + count, dtype=torch.float64, device=self.vectors.device)
            inner, cross = products[:, :size], products[:, size:]
            encoder, dtype, start = self.encoder.T.to(products.device), tensors[name].dtype, 0
            for part in blocks(self.vectors.deltas(name)):
                stored = (encoder @ part).to(dtype)
                rounded = stored.to(torch.float64)
                _check_range(rounded, name, dtype)
                for row in range(size):
                    files.write(name, stored[row], row * base[name].numel + start)
                inner += rounded @ rounded.T
                cross += rounded @ part.T
                start += part.shape[1]
            return [*inner.flatten().tolist(), *cross.flatten().tolist()]

        weight = lambda name: base[name].nbytes * (count + 1)  # noqa: E731
        need = lambda name: ENCODE_BYTES + self.vectors.copied(name)  # noqa: E731
        width, reads = size * (size + count), self.vectors.stored
        table = written(files, self.names, write, width, "Writing bases", weight, need, reads)
        total = table.sum(dim=0)
        inner, cross = total[: size * size].reshape(size, size), total[size * size :].reshape(size, count)
        return info.refitted(*refit(inner, cross, self.has_mean))


@dataclass(frozen=True)
class TruncatedVectors:
    """Each task vector for itself, its matrices cut to their leading singular components (TSV-Compress).

    ``ranks`` [T] by weight; a weight without ranks (a bias, or a matrix whose factors would be larger) is kept whole.
    """

    vectors: Vectors
    ranks: Ranks
    dtype: torch.dtype | None

    @property
    def names(self) -> tuple[str, ...]:
        return self.vectors.names

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for name in self.names:
            base = self.vectors.base.tensors[name]
            dtype = self.dtype or base.dtype
            if name in self.ranks:
                total = sum(self.ranks[name])
                found[name + LEFT] = TensorInfo((base.shape[0], total), dtype)
                found[name + RIGHT] = TensorInfo((total, base.shape[1]), dtype)
            else:
                found[name] = TensorInfo((len(self.vectors), *base.shape), dtype)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self.vectors.base.tensors[name].shape

    def deltas(self, name: str) -> list[Delta]:
        dtype = self.dtype or self.vectors.base.tensors[name].dtype
        deltas = self.vectors.deltas(name)
        if name not in self.ranks:
            return [Dense(dense(delta).to(dtype)) for delta in deltas]
        cut = [
            _balanced(svd(d, r).low_rank() if r else LowRank.zeros(d.shape, d.device))
            for d, r in zip(deltas, self.ranks[name], strict=True)
        ]
        return [LowRank(part.left.to(dtype), part.right.to(dtype)) for part in cut]

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        return []

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        files = TensorFiles(directory, VECTORS_STEM, self.tensors)
        lost = torch.zeros(len(self.vectors), dtype=torch.float64)
        base = self.vectors.base.tensors
        for name in track(self.names, "Writing components", lambda n: base[n].nbytes):
            parts = self.deltas(name)
            for index, (part, delta) in enumerate(zip(parts, self.vectors.deltas(name), strict=True)):
                difference = dense(delta) - dense(part)
                _check_range(difference, name, self.dtype or base[name].dtype)
                lost[index] += float(difference.square().sum())
            write_vectors(files, name, parts)
        return info.with_errors(lost)


@dataclass(frozen=True)
class StoredVectors:
    """Vectors read back from the files of a basis directory."""

    checkpoint: Checkpoint
    ranks: Ranks
    rows: int

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.checkpoint.tensors

    @property
    def names(self) -> tuple[str, ...]:
        factors = {name + end for name in self.ranks for end in (LEFT, RIGHT)}
        return (*self.ranks, *(name for name in self.tensors if name not in factors))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.ranks:
            return self.tensors[name].shape[1:]
        return self.tensors[name + LEFT].shape[0], self.tensors[name + RIGHT].shape[1]

    def deltas(self, name: str) -> list[Delta]:
        """Raises CheckpointError for NaN and infinity."""
        if name not in self.ranks:
            return [Dense(row) for row in read_finite(self.checkpoint, name)]
        left, right = (read_finite(self.checkpoint, name + end) for end in (LEFT, RIGHT))
        sizes = list(self.ranks[name])
        return [LowRank(a, b) for a, b in zip(left.split(sizes, dim=1), right.split(sizes, dim=0), strict=True)]

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        return []

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        files = TensorFiles(directory, VECTORS_STEM, self.tensors)
        for name in track(list(self.tensors), "Writing", lambda n: self.tensors[n].nbytes):
            files.write(name, read_finite(self.checkpoint, name))
        return info

    def check(self, label: str) -> None:
        """CheckpointError unless every weight holds as many vectors as the configuration names."""
        for name in self.names:
            if name in self.ranks:
                sides = [self.tensors[name + end] for end in (LEFT, RIGHT) if name + end in self.tensors]
                total = sum(self.ranks[name])
                good = [len(side.shape) for side in sides] == [2, 2]
                good = good and (sides[0].shape[1], sides[1].shape[0]) == (total, total)
            else:
                sides = [self.tensors[name]]
                good = sides[0].shape[:1] == (self.rows,)
            if not good or not all(side.dtype.is_floating_point for side in sides):
                raise CheckpointError(
                    f'"{label}": {name} does not hold the {self.rows} vectors that the configuration names'
                )


def write_vectors(files: TensorFiles, name: str, parts: Sequence[Delta]) -> None:
    """All vectors' parts of one weight, in the layout of the module docstring."""
    factors = low_parts(parts)
    if factors:
        files.write(name + LEFT, torch.cat([part.left for part in factors], dim=1))
        files.write(name + RIGHT, torch.cat([part.right for part in factors], dim=0))
    else:
        files.write(name, torch.stack([tensor for part in parts for tensor in part.stored]))


def refit(inner: Tensor, cross: Tensor, has_mean: bool) -> tuple[Tensor, Tensor]:
    """Decoder [rows, T] of least error for the stored (rounded) vectors, and the squared error it saves per task [T].

    ``inner`` [rows, rows] and ``cross`` [rows, T] are the stored vectors' products with themselves and with the task
    vectors. A mean (last row) is added to every reconstruction as it is; the other rows are fitted to what remains.
    """
    squares = inner.diagonal().clamp_min(GRAM_CUTOFF**2 * inner.diagonal().max())  # a shorter vector is noise
    if not has_mean:
        decoder = solve_psd(inner, cross, squares)
    else:
        bases = solve_psd(inner[:-1, :-1], cross[:-1] - inner[:-1, -1:], squares[:-1])
        decoder = torch.cat([bases, torch.ones(1, cross.shape[1], dtype=torch.float64)])
    saved = 2 * (decoder * cross).sum(dim=0) - (decoder * (inner @ decoder)).sum(dim=0)
    return decoder, saved


def _balanced(delta: LowRank) -> LowRank:
    """The same product with both factors of one size, so that neither loses digits (or overflows) in a short dtype."""
    left, right = delta.left.norm(dim=0), delta.right.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-30)).sqrt(), torch.ones_like(left))
    return LowRank(delta.left * scale, delta.right / scale[:, None])


def _check_range(values: Tensor, name: str, dtype: torch.dtype) -> None:
    if not torch.isfinite(values).all():
        raise ParameterError(f"tensor {name} overflows {dtype}; store it as bfloat16 or float32")


def stored_encoder(weights: BasisWeights) -> Tensor:
    """[T, rows] how the stored vectors are made of the task vectors: the bases, then the mean if there is one."""
    return weights.encoder if weights.mean is None else torch.cat([weights.encoder, weights.mean[:, None]], dim=1)
