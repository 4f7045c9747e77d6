"""Masked vectors as they are stored: the numbers under the mask and where they are, compressed by rows (CSR)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..storage.json_files import parse_json
from ..storage.output import contains_only, transaction
from ..storage.tensor_files import ONE_FILE, TensorFiles
from ..storage.tensors import TensorInfo

STEM = "masked_vectors"
FILE = f"{STEM}.safetensors"
PARTS = ("crow", "columns", "values")


@dataclass(frozen=True)
class Csr:
    """A tensor of ``shape``, rows along its first dimension: row r has its numbers at crow[r]..crow[r + 1].

    ``crow`` int64 [rows + 1], ``columns`` int32 and ``values`` float32 [nonzero]. (torch's own sparse CSR tensors are
    not stored by safetensors, and have two dimensions.)
    """

    shape: tuple[int, ...]
    crow: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def masked(cls, tensor: Tensor, mask: Tensor) -> Csr:
        """The numbers of ``tensor`` where ``mask`` is true, zeros among them too."""
        flat = mask.reshape(_rows(tensor.shape), -1)
        rows, columns = flat.nonzero(as_tuple=True)
        crow = torch.zeros(len(flat) + 1, dtype=torch.int64)
        crow[1:] = torch.bincount(rows.cpu(), minlength=len(flat)).cumsum(0)
        values = tensor.reshape(flat.shape)[rows, columns]
        return cls(tuple(tensor.shape), crow, columns.to("cpu", torch.int32), values.to("cpu", torch.float32))

    def check(self) -> None:
        """ValueError for places that are not in order, or not in a tensor of this shape."""
        rows = _rows(self.shape)
        counts = self.crow.diff()
        sound = self.crow.shape == (rows + 1,) and self.columns.shape == self.values.shape == (int(self.crow[-1]),)
        sound = sound and int(self.crow[0]) == 0 and bool((counts >= 0).all())
        if not sound or not ((self.columns >= 0) & (self.columns < math.prod(self.shape) // max(1, rows))).all():
            raise ValueError(f"places that are not in a tensor of shape {list(self.shape)}")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.crow.nbytes + self.columns.nbytes + self.values.nbytes

    def positions(self) -> Tensor:
        """[nonzero] int64 positions in the flattened tensor, ascending."""
        rows = _rows(self.shape)
        width = math.prod(self.shape) // max(1, rows)
        counts = self.crow[1:] - self.crow[:-1]
        return torch.repeat_interleave(torch.arange(rows), counts) * width + self.columns.to(torch.int64)

    def mask(self) -> Tensor:
        """[*shape] bool."""
        found = torch.zeros(math.prod(self.shape), dtype=torch.bool)
        found[self.positions()] = True
        return found.reshape(self.shape)

    def dense(self) -> Tensor:
        """[*shape] float32."""
        found = torch.zeros(math.prod(self.shape))
        found[self.positions()] = self.values
        return found.reshape(self.shape)


def _rows(shape: Sequence[int]) -> int:
    """A vector or a number is one row."""
    return shape[0] if len(shape) > 1 else 1


@dataclass(frozen=True)
class MaskedVectors:
    """K sparse vectors: ``parts[k]`` {weight: its numbers}, ``labels`` [K] what they are called."""

    labels: tuple[str, ...]
    parts: tuple[Mapping[str, Csr], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts[0])

    @property
    def nbytes(self) -> int:
        return sum(csr.nbytes for part in self.parts for csr in part.values())

    @property
    def density(self) -> tuple[float, ...]:
        """[K] share of the numbers that each vector keeps."""
        sizes = [sum(math.prod(csr.shape) for csr in part.values()) for part in self.parts]
        kept = [sum(len(csr) for csr in part.values()) for part in self.parts]
        return tuple(k / max(1, size) for k, size in zip(kept, sizes, strict=True))

    def save(self, directory: str | Path) -> Path:
        """One safetensors file in a directory of its own, whole or not at all. OutputError where that cannot be."""
        out = Path(directory)
        tensors = {
            f"{k}.{part}.{name}": getattr(csr, part)
            for k, vector in enumerate(self.parts)
            for name, csr in vector.items()
            for part in PARTS
        }
        shapes = {name: list(csr.shape) for name, csr in self.parts[0].items()}
        with transaction(out, lambda path: contains_only(path, [FILE]), self.nbytes) as work:
            # safetensors' own writer puts the words of the header in another order in every run
            infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            words = {"labels": json.dumps(self.labels), "shapes": json.dumps(shapes)}
            files = TensorFiles(work, STEM, infos, ONE_FILE, words)
            for name, tensor in tensors.items():
                files.write(name, tensor)
        return out

    @classmethod
    def load(cls, directory: str | Path) -> MaskedVectors:
        """What ``save`` wrote. CheckpointError if there is none, or it is damaged."""
        file = Path(directory) / FILE
        if not file.is_file():
            raise CheckpointError(f'"{directory}" holds no masked vectors ({FILE} is absent)')
        try:
            with safe_open(file, framework="pt") as stream:
                metadata = stream.metadata()
                labels, shapes = tuple(parse_json(metadata["labels"])), parse_json(metadata["shapes"])
                parts = tuple(
                    {
                        name: Csr(tuple(shape), *(stream.get_tensor(f"{k}.{part}.{name}") for part in PARTS))
                        for name, shape in shapes.items()
                    }
                    for k in range(len(labels))
                )
                for csr in (csr for part in parts for csr in part.values()):
                    csr.check()
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f'"{file}" is damaged, or was not written by this program: {error}') from error
        return cls(labels, parts)
