"""The files that a command writes besides its output: reports (JSON), pictures (PNG) and pages (HTML).

Each has ``tvbases_report`` and the version near its start: as the first key of JSON, in a text chunk of a PNG, as the
generator of a page. So a file that we wrote is known, and replaced; any other that is not empty is refused.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..version import library_version
from .files import home_path
from .output import file_transaction
from .run import current

MARK = "tvbases_report"
# The mark is in the first so many bytes.
START = 512
# The signature of a PNG and its first chunk, IHDR.
PNG_HEADER = 8 + 25


def is_report(file: Path) -> bool:
    """Whether one of our reports, pictures or pages may be written in this file's place."""
    if not file.is_file():
        return True  # a pipe or a device
    try:
        with file.open("rb") as stream:
            start = stream.read(START)
    except OSError:
        return False
    return not start or MARK.encode() in start


def write_report(file: str | Path, report: Mapping[str, Any]) -> None:
    """Write JSON: readable, key order as given, floats exact. Raises OutputError as ``write_whole`` does."""
    text = json.dumps({MARK: library_version(), **report}, indent=2, ensure_ascii=False) + "\n"
    write_whole(file, text.encode("utf-8", "backslashreplace"))  # half of a surrogate pair as JSON's own escape


def write_picture(file: str | Path, png: bytes, is_ours: Callable[[Path], bool] = is_report) -> None:
    """Write a PNG with our mark in it. Raises OutputError as ``write_whole`` does."""
    said = b"tEXt" + f"{MARK}\0{library_version()}".encode("latin-1")
    chunk = struct.pack(">I", len(said) - 4) + said + struct.pack(">I", zlib.crc32(said))
    write_whole(file, png[:PNG_HEADER] + chunk + png[PNG_HEADER:], is_ours)


def write_whole(file: str | Path, content: bytes, is_ours: Callable[[Path], bool] = is_report) -> None:
    """Write a file whole or not at all, by the first of several processes.

    Raises OutputError for a file that is not ours, cannot be written, or a full disk; what was there stays.
    """
    file = home_path(file)
    if current().team.rank > 0:
        return
    if file.exists() and not file.is_file() and not file.is_dir():
        try:
            file.write_bytes(content)  # a pipe or a device takes no file's place
        except OSError as error:
            raise OutputError(f'"{file}" cannot be written: {error.strerror}') from error
        return
    with file_transaction(file, is_ours) as draft:
        draft.write_bytes(content)
