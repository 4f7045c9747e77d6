"""What a run has finished, so that the same run can go on where it was killed.

A journal is a file beside the directory that is being written: a line for the job, then one for every tensor that is
whole, with a checksum of its bytes and the numbers that came out beside it. Lines are appended; one that is cut off
does not count.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .json_files import parse_json

PATTERN = "journal-*.jsonl"


@dataclass(frozen=True)
class Entry:
    checksum: int
    row: tuple[float, ...]


def job_key(job: Mapping[str, Any]) -> str:
    """A digest of whatever decides the output."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


class Journal:
    """Reads all journals in a directory, and appends to this process's own."""

    def __init__(self, directory: Path, key: str, rank: int) -> None:
        self.entries = read_entries(directory, key)
        self._file = directory / f"journal-{rank}.jsonl"
        self._lock = threading.Lock()
        if not _is_of(self._file, key):
            self._file.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")

    def add(self, name: str, checksum: int, row: Sequence[float]) -> None:
        line = json.dumps({"name": name, "checksum": checksum, "row": list(row)})
        with self._lock, open(self._file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def read_entries(directory: Path, key: str) -> dict[str, Entry]:
    """Everything that a run of this job has finished there."""
    found = {}
    for file in sorted(directory.glob(PATTERN)):
        if _is_of(file, key):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
                try:
                    entry = parse_json(line)
                    row = tuple(map(float, entry["row"]))
                    if all(map(math.isfinite, row)):
                        found[entry["name"]] = Entry(entry["checksum"], row)
                except (ValueError, KeyError, TypeError):  # cut off
                    continue
    return found


def is_of(directory: Path, key: str) -> bool:
    """Whether a directory holds a journal of this job."""
    return any(_is_of(file, key) for file in directory.glob(PATTERN))


def _is_of(file: Path, key: str) -> bool:
    try:
        with open(file, encoding="utf-8", errors="replace") as stream:
            return parse_json(stream.readline())["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return False
