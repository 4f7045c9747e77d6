"""Tensors of safetensors files, read into memory of their own.

A mapped file takes memory for every page that was touched as long as it is open: of a thousand files that are read in
turn that is all of them. Here nothing stays but where each tensor is.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensors import DTYPES, TensorInfo

# By header: files of one training script have the same one, and share what it says.
_KNOWN: dict[bytes, dict[str, tuple[TensorInfo, int]]] = {}
MOST_KNOWN = 64


@dataclass(frozen=True)
class Slices:
    """Where the tensors of one safetensors file are: ``places`` by name, what it is and where its bytes begin."""

    file: Path
    places: dict[str, tuple[TensorInfo, int]]

    @classmethod
    def open(cls, file: Path, label: str) -> Slices:
        """Reads the header only. Raises CheckpointError for a file that is cut off, or is something else."""
        try:
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > os.fstat(stream.fileno()).st_size:
                    raise ValueError("the header is longer than the file")
                header = stream.read(length)
                size = os.fstat(stream.fileno()).st_size
            places = _KNOWN.get(header) or _places(header, 8 + length)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise _damaged(label, file, error) from error
        if len(_KNOWN) < MOST_KNOWN:
            _KNOWN[header] = places
        if max((start + info.nbytes for info, start in places.values()), default=0) > size:
            raise _damaged(label, file, "it is cut off")
        return cls(file, places)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for name, (info, _) in self.places.items()}

    def read(self, name: str) -> Tensor:
        """A tensor, copied. Raises CheckpointError where the file has become shorter."""
        info, start = self.places[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        found = torch.empty(info.shape, dtype=info.dtype)
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(start)
            if stream.readinto(found.view(-1).view(torch.uint8).numpy().data) != info.nbytes:
                raise _damaged(str(self.file), self.file, "it is cut off")
        return found


def _places(header: bytes, data: int) -> dict[str, tuple[TensorInfo, int]]:
    found = {}
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if start < 0 or stop - start != info.nbytes:
                raise ValueError(f"{name} has {stop - start} bytes where its shape takes {info.nbytes}")
            found[name] = (info, data + start)
    return found


def _damaged(label: str, file: Path, why: object) -> CheckpointError:
    return CheckpointError(f'"{label}": {file.name} is not a whole safetensors file ({why}); copy it again')
