"""Tensors streamed into safetensors files: a piece of one at a time, in any order, from several processes."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .output import journal_of
from .run import once
from .tensors import DTYPES, TensorInfo

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_SIZE = "5GB"
ONE_FILE = 1 << 60
CHECKED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class _Slot:
    file: Path
    offset: int
    info: TensorInfo


class TensorFiles:
    """A set of safetensors files whose sizes are known beforehand and whose contents arrive in any order.

    safetensors' own writer takes all tensors of a file at once; this one takes a piece of one tensor at a time, so
    that memory does not grow with the file. The format is a length, a JSON header and the bytes.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        tensors: Mapping[str, TensorInfo],
        max_shard_size: int | str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        split = _split(stem, tensors, max_shard_size)
        self._journal, self._place = journal_of(directory)
        self._slots: dict[str, _Slot] = {}
        headers: dict[Path, bytes] = {}
        for file, names in split.filename_to_tensors.items():
            chosen = {name: tensors[name] for name in names}
            headers[directory / file] = header = _header(chosen, metadata or {})
            self._slots |= _slots(directory / file, len(header), chosen)
        once(lambda: _begin(headers, self._slots))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Put ``values`` (any shape, the tensor's dtype, any device) at element ``start`` of the flattened ``name``."""
        slot = self._slots[name]
        if values.dtype != slot.info.dtype or start + values.numel() > slot.info.numel:
            raise ValueError(f"{name}: {values.numel()} {values.dtype} at {start} do not fit {slot.info}")
        if values.numel():
            with open(slot.file, "r+b") as stream:
                stream.seek(slot.offset + start * slot.info.dtype.itemsize)
                # Not numpy's tofile: its OSError for a full disk does not say that the disk is full.
                stream.write(values.reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data)

    def finished(self, name: str, tensors: Sequence[str] | None = None) -> tuple[float, ...] | None:
        """The numbers that were recorded with a tensor that a killed run of this job has written, if it is intact.

        ``tensors`` are those that make up ``name`` where that is not a tensor itself.
        """
        entry = self._journal.entries.get(self._place + name) if self._journal else None
        return entry.row if entry is not None and entry.checksum == self._checksum(tensors or (name,)) else None

    def finish(self, name: str, row: Sequence[float] = (), tensors: Sequence[str] | None = None) -> None:
        """Record that a tensor is whole, or all that make up ``name``, and numbers that a later run needs of it."""
        if self._journal is not None:
            self._journal.add(self._place + name, self._checksum(tensors or (name,)), row)

    def _checksum(self, tensors: Sequence[str]) -> int:
        found = 0
        for slot in map(self._slots.__getitem__, tensors):
            with open(slot.file, "rb") as stream:
                stream.seek(slot.offset)
                for start in range(0, slot.info.nbytes, CHECKED_AT_ONCE):
                    found = zlib.crc32(stream.read(min(CHECKED_AT_ONCE, slot.info.nbytes - start)), found)
        return found


def metadata_of(file: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; nothing of any other file."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def file_bytes(tensors: Mapping[str, TensorInfo], max_shard_size: int | str | None = None) -> int:
    """What all safetensors files of these tensors take, headers included."""
    parts = _split("model", tensors, max_shard_size).filename_to_tensors.values()
    headers = [_header({name: tensors[name] for name in names}, {}) for names in parts]
    return sum(map(len, headers)) + sum(info.nbytes for info in tensors.values())


def _split(stem: str, tensors: Mapping[str, TensorInfo], max_shard_size: int | str | None) -> Any:
    """Which tensors go into which file. The same tensors make the same files.

    Wider numbers first keeps every tensor aligned to its own size, as safetensors' writer does; then by name.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    return split_state_dict_into_shards_factory(
        {name: tensors[name] for name in order},
        get_storage_size=lambda info: info.nbytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE if max_shard_size is None else max_shard_size,
    )


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, info in tensors.items():
        offsets = [position, position + info.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _slots(file: Path, start: int, tensors: Mapping[str, TensorInfo]) -> dict[str, _Slot]:
    """Where each tensor goes."""
    slots = {}
    for name, info in tensors.items():
        slots[name] = _Slot(file, start, info)
        start += info.nbytes
    return slots


def _begin(headers: Mapping[Path, bytes], slots: Mapping[str, _Slot]) -> None:
    """Write the headers and reserve the bytes, except in files that a run of the same job has left."""
    sizes = {file: len(header) for file, header in headers.items()}
    for slot in slots.values():
        sizes[slot.file] += slot.info.nbytes
    for file, header in headers.items():
        if not (file.is_file() and file.stat().st_size == sizes[file]):
            with open(file, "wb") as stream:
                stream.write(header)
                stream.truncate(sizes[file])
