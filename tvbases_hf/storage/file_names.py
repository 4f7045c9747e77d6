"""Names that become files or directories: one check for all of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from ..errors import ParameterError
from ..text import printable

# Bytes of UTF-8; file systems allow 255, of which what is added in front and behind takes some.
LONGEST = 200
# What some system gives another meaning: a path, a drive, a stream, a pattern.
FORBIDDEN = frozenset('/\\:*?"<>|')
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
SHOWN = 40


def check_name(name: str, what: str) -> str:
    """A name that is one file or directory, in the place where it is put and on any system; ``what`` it is of.

    Raises ParameterError with the reason for any other.
    """
    reason = _reason(name)
    if reason:
        shown = printable(name if len(name) <= SHOWN else name[:SHOWN] + "...")
        raise ParameterError(f'{what} "{shown}" cannot be the name of a file: {reason}; choose another name')
    return name


def check_names(names: Iterable[str], what: str) -> None:
    """``check_name`` of each, and no two that some file system takes for one."""
    seen: dict[str, str] = {}
    for name in names:
        check_name(name, what)
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ParameterError(
                f'{what}s "{other}" and "{name}" would be one file where upper and lower case, or two spellings of a '
                "letter, are the same; choose another name"
            )


def _reason(name: str) -> str | None:
    if not name.strip():
        return "it is empty"
    if set(name) == {"."}:
        return "it means another directory"
    if printable(name) != name:
        return "it has characters that cannot be seen"
    if forbidden := sorted(FORBIDDEN.intersection(name)):
        return f"it has {forbidden[0]} in it"
    if len(name.encode()) > LONGEST:
        return f"it has {len(name.encode())} bytes, more than {LONGEST}"
    if name != name.strip() or name.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if name.partition(".")[0].strip().casefold() in DEVICES:
        return "it is a device of Windows"
    return None
