"""Writing as a transaction: a directory appears whole or not at all; tensors are streamed into safetensors files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import socket
import struct
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from .checkpoint import DTYPES, TensorInfo
from .errors import OutputError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_SIZE = "5GB"
# What an old output is called while the new one takes its place, where the two cannot be exchanged in one step.
ASIDE = "-old"


@contextlib.contextmanager
def transaction(out: str | Path, is_ours: Callable[[Path], bool], needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty directory beside ``out`` that takes its place when the block ends, and vanishes if it fails.

    ``out`` may be absent, empty, or something that ``is_ours`` recognises, which is then replaced whole. A process
    killed at any time leaves the old ``out`` or the new one; what it had begun is removed by the next run.

    Raises:
        OutputError: ``out`` is something else, cannot be written, or the disk is (or gets) full.
    """
    check_output(out, is_ours)
    out = Path(out).expanduser().resolve()  # a link stays, and what it points to is replaced
    with writing(out, needed_bytes):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)  # first, because what a killed run left takes space too
        _check_space(out.parent, needed_bytes)
        scratch = out.parent / f".{out.name}.tvbases-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        work = scratch / out.name  # programs that write there may put the directory's name into a file
        work.mkdir(parents=True)
        try:
            yield work
            _sync_tree(work)
            _take_place(work, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def file_transaction(out: str | Path, is_ours: Callable[[Path], bool], needed_bytes: int = 0) -> Iterator[Path]:
    """Yield where to write a file that takes the place of ``out`` when the block ends, and vanishes if it fails.

    Raises OutputError as ``transaction`` does.
    """
    check_output_file(out, is_ours)
    out = Path(out).expanduser().resolve()
    with writing(out, needed_bytes):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        _check_space(out.parent, needed_bytes)
        scratch = out.parent / f".{out.name}.tvbases-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        scratch.mkdir()
        try:
            yield scratch / out.name
            _sync_tree(scratch)
            (scratch / out.name).replace(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_output_file(out: str | Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise OutputError if ``out`` is a directory, or a file that this program did not write."""
    out = Path(out).expanduser()
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f'"{out}" cannot be a file: "{above}" is a file itself')
    if out.is_dir():
        raise OutputError(f'"{out}" is a directory; give the name of a file')
    if out.exists() and not is_ours(out):
        raise OutputError(f'"{out}" exists and this command did not write it; choose another name, or remove it')


def check_output(out: str | Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise OutputError if ``out`` holds anything that this program did not write."""
    out = Path(out).expanduser()
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f'"{out}" cannot be a directory: "{above}" is a file')
    if out.is_file() or (out.is_symlink() and not out.is_dir()):
        raise OutputError(f'"{out}" is a file; choose a directory that does not exist yet')
    if out.is_dir() and any(out.iterdir()) and not is_ours(out):
        names = sorted(file.name for file in out.iterdir())
        raise OutputError(
            f'"{out}" exists and holds something that this command did not write ({len(names)} entries, first: '
            f"{names[0]}); nothing was changed. Choose another directory, or remove it yourself"
        )


@contextlib.contextmanager
def writing(out: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals to write into OutputErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(out.parent, needed_bytes) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise OutputError(f'"{out}" cannot be written: {error.strerror} ({error.filename})') from error
        raise


def _disk_full(directory: Path, needed_bytes: int) -> OutputError:
    free = readable_size(_free_bytes(directory))
    need = f"{readable_size(needed_bytes)} are needed, " if needed_bytes else ""
    return OutputError(
        f'the disk of "{directory}" is full: {need}{free} are free. Nothing was left behind; '
        "free some space or write to another disk"
    )


def readable_size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _check_space(directory: Path, needed_bytes: int) -> None:
    if needed_bytes > _free_bytes(directory):
        raise _disk_full(directory, needed_bytes)


def _free_bytes(directory: Path) -> int:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _sweep(out: Path) -> None:
    """Remove what killed runs on this host left beside ``out``; a running process keeps its own."""
    prefix = f".{out.name}.tvbases-{socket.gethostname()}-"
    for left in list(out.parent.iterdir()):
        pid, _, rest = left.name.removeprefix(prefix).partition("-")
        if left.name.startswith(prefix) and pid.isdigit() and "-" not in rest and not _is_alive(int(pid)):
            _put_back(left / (out.name + ASIDE), out)
            shutil.rmtree(left, ignore_errors=True)


def _put_back(aside: Path, out: Path) -> None:
    """Return what was moved aside for something new that did not come."""
    if aside.exists() and not out.exists():
        aside.rename(out)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # Windows has no harmless signal to ask with: leave the directory to the user
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if os.name == "nt" and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(work: Path, out: Path) -> None:
    """Put ``work`` where ``out`` is, atomically where the system can exchange two directories (Linux)."""
    if not out.exists():
        work.rename(out)
    elif not _exchange(work, out):
        aside = work.with_name(out.name + ASIDE)
        out.rename(aside)
        try:
            work.rename(out)
        finally:
            _put_back(aside, out)
    if os.name != "nt":
        descriptor = os.open(out.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


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
        # Wider numbers first keeps every tensor aligned to its own size, as safetensors' writer does; then by name, so
        # that the same tensors make the same files.
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        split = split_state_dict_into_shards_factory(
            {name: tensors[name] for name in order},
            get_storage_size=lambda info: info.nbytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=MAX_SHARD_SIZE if max_shard_size is None else max_shard_size,
        )
        self._slots: dict[str, _Slot] = {}
        for file, names in split.filename_to_tensors.items():
            self._slots |= _begin_file(directory / file, {name: tensors[name] for name in names}, metadata or {})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Put ``values`` (any shape, the tensor's dtype) at element ``start`` of the flattened tensor ``name``."""
        slot = self._slots[name]
        if values.dtype != slot.info.dtype or start + values.numel() > slot.info.numel:
            raise ValueError(f"{name}: {values.numel()} {values.dtype} at {start} do not fit {slot.info}")
        if values.numel():
            with open(slot.file, "r+b") as stream:
                stream.seek(slot.offset + start * slot.info.dtype.itemsize)
                # Not numpy's tofile: its OSError for a full disk does not say that the disk is full.
                stream.write(values.reshape(-1).contiguous().view(torch.uint8).numpy().data)


def _begin_file(file: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, _Slot]:
    """Write the header, reserve the bytes, and return where each tensor goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, info in tensors.items():
        offsets = [position, position + info.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)
    start = 8 + len(text)
    slots = {}
    for name, info in tensors.items():
        slots[name] = _Slot(file, start, info)
        start += info.nbytes
    return slots


def write_json(file: Path, value: object) -> None:
    """Readable, key order as given, floats exact (Python's shortest round-trip form)."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def contains_only(directory: Path, patterns: Sequence[str]) -> bool:
    """Whether every entry of the directory matches one of the glob patterns."""
    return all(any(entry.match(pattern) for pattern in patterns) for entry in directory.iterdir())
