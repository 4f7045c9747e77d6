"""What the machine refuses: places that cannot be written, disks that are full, files that are too large."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import OutputError

# What a system says of a place where nothing can be written.
REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EBUSY, errno.EXDEV),  # a place where another file system begins
)
# What it says where it cannot make sure that something is on the disk; EACCES: a directory that may not be listed.
UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)


@contextlib.contextmanager
def writing(out: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals to write into OutputErrors."""
    try:
        with _numbered():
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(out.parent, needed_bytes) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f'"{out}": a file got larger than this shell or file system allows (`ulimit -f` shows the limit); '
                "nothing was left behind. Raise the limit, or write to another disk"
            ) from error
        if error.errno in REFUSALS:
            where = f" ({error.filename})" if error.filename else ""
            raise OutputError(f'"{out}" cannot be written: {error.strerror}{where}') from error
        raise


@contextlib.contextmanager
def _numbered() -> Iterator[None]:
    """safetensors hides the operating system's error number in its message."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.ENOSPC if "No space left" in str(error) else None
        if code is None:
            raise
        raise OSError(code, str(error)) from error


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


def check_space(directory: Path, needed_bytes: int) -> None:
    if needed_bytes > _free_bytes(directory):
        raise _disk_full(directory, needed_bytes)


def _free_bytes(directory: Path) -> int:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def sync(path: Path) -> None:
    """Have a file or a directory on the disk, where the file system can: some of networks and containers cannot."""
    if os.name == "nt" and path.is_dir():
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
