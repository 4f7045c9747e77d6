"""The files of a library: the rows of one cluster's shared directions, or of one task's cores, weight after weight.

A file holds three tensors: ``codes`` uint8 and ``scales`` bfloat16, flat, and ``counts`` int16 [weights, 2, 3], how
many rows there are in 16, 8 and 4 bits. They follow one another weight by weight, then stack by stack: of a cluster the
left directions (rows of n numbers) and the right ones (of m); of a task the left and the right factor of its core, then
the left and the right factor of what it has beside it. Both factors have the same counts. A core between shared
directions of both sides has no left factor.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError
from ...storage.slices import Slices
from .bits import BITS, GROUP, decode_stack

CODES, SCALES, COUNTS = "codes", "scales", "counts"


@dataclass
class Packer:
    """Collects one file: codes go to disk as they come, the rest is small, and kept as bytes: there are many files."""

    stream: Path
    scales: bytearray = field(default_factory=bytearray)
    counts: bytearray = field(default_factory=bytearray)

    def add(self, codes: bytes, scales: bytes, counts: Tensor) -> None:
        """The stacks of the next weight; ``counts`` [2, 3]."""
        if codes:
            with open(self.stream, "ab", buffering=0) as out:
                out.write(codes)
        self.scales += scales
        self.counts += counts.to(torch.int16).contiguous().numpy().tobytes()

    def finish(self, file: Path) -> int:
        """Write the file; returns its checksum."""
        codes = self.stream.read_bytes() if self.stream.exists() else b""
        self.stream.unlink(missing_ok=True)
        tensors = {
            CODES: _tensor(codes, torch.uint8),
            SCALES: _tensor(self.scales, torch.bfloat16),
            COUNTS: _tensor(self.counts, torch.int16).reshape(-1, 2, len(BITS)),
        }
        save_file(tensors, file, {"format": "pt"})
        return checksum(file)


def _tensor(data: bytes | bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def checksum(file: Path) -> int:
    found = 0
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            found = zlib.crc32(piece, found)
    return found


@dataclass(frozen=True)
class Packed:
    """A file that was read: ``stack(weight, place)`` gives rows [K, size].

    ``sizes`` [weights, stacks] are the lengths of rows, 0 where there is no stack.
    """

    codes: Tensor
    scales: Tensor
    counts: Tensor
    sizes: Tensor
    starts: Tensor
    """[weights * stacks + 1, 2] where the codes and the scales of each stack begin."""

    @classmethod
    def open(cls, file: Path, label: str, sizes: Tensor) -> Packed:
        """Raises CheckpointError where the file does not hold what its counts say."""
        slices = Slices.open(file, label)
        if set(slices.places) != {CODES, SCALES, COUNTS}:
            raise CheckpointError(f'"{label}": {file.name} is no file of a library; copy it again')
        codes, scales, counts = (slices.read(name) for name in (CODES, SCALES, COUNTS))
        good = (codes.dtype, scales.dtype, counts.dtype) == (torch.uint8, torch.bfloat16, torch.int16)
        if not good or counts.shape != (len(sizes), 2, len(BITS)) or (counts < 0).any():
            raise _damaged(label, file)
        counts = counts.long().repeat_interleave(sizes.shape[1] // 2, dim=1)
        wide = (sizes[:, :, None] * torch.tensor(BITS) + 7) // 8
        numbers = torch.stack([(counts * wide).sum(2), counts.sum(2) * ((sizes + GROUP - 1) // GROUP)], dim=2)
        starts = torch.cat([torch.zeros(1, 2, dtype=torch.int64), numbers.flatten(0, 1).cumsum(0)])
        if starts[-1].tolist() != [len(codes), len(scales)] or not torch.isfinite(scales).all():
            raise _damaged(label, file)
        return cls(codes, scales, counts, sizes, starts)

    def stack(self, weight: int, place: int) -> Tensor:
        """[K, size] float32; K 0 where there is none."""
        size, counts = int(self.sizes[weight, place]), self.counts[weight, place].tolist()
        if not size or not any(counts):
            return torch.empty(0, size)
        at = weight * self.sizes.shape[1] + place
        (code, scale), (code_end, scale_end) = self.starts[at].tolist(), self.starts[at + 1].tolist()
        return decode_stack(self.codes[code:code_end], self.scales[scale:scale_end], counts, size)


def _damaged(label: str, file: Path) -> CheckpointError:
    return CheckpointError(f'"{label}": {file.name} does not hold the rows that it names; copy the library again')


def task_sizes(shared: Tensor | None, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """[weights, 4] the lengths of a task's rows; ``shared`` [weights, 2, 3] are the counts of its cluster."""
    sizes = torch.tensor(shapes, dtype=torch.int64).repeat(1, 2)
    if shared is not None:
        common = shared.long().sum(2)
        both = (common > 0).all(1)
        sizes[:, :2] = torch.where(common > 0, common, sizes[:, :2])
        sizes[both, 0] = 0
    return sizes
