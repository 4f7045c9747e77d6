"""Files that are being read: one that changes meanwhile is said, and nothing is made of it."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError


class Input:
    """A file as it was when it was opened; whoever reads it keeps this, and says when it does.

    A file that another one takes the place of is no matter: what was opened is still there, and whole.
    """

    def __init__(self, file: Path, label: str) -> None:
        self.file, self.label, self.read_at = file, label, 0
        self._before = _state(file)
        _OPEN.add(self)

    def now_read(self) -> None:
        self.read_at = time.monotonic_ns()

    def check(self) -> None:
        """CheckpointError if the file has another size or date."""
        now = _state(self.file)
        if now and self._before and now[0] == self._before[0] and now != self._before:
            raise CheckpointError(
                f'"{self.label}": {self.file.name} was written to while it was read: its size or date is another; '
                "run this again when nothing writes there any more"
            )


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """CheckpointError at the end of the block if a file that was read in it has changed since it was opened."""
    start = time.monotonic_ns()
    yield
    for one in sorted(_OPEN, key=lambda one: str(one.file)):
        if one.read_at >= start:
            one.check()


_OPEN: weakref.WeakSet[Input] = weakref.WeakSet()


def _state(file: Path) -> tuple[tuple[int, int], int, int] | None:
    """Which file it is, its size and its date; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns
