"""JSON of files that anybody may have written: read within limits, or refused with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import CheckpointError

# What Python's own reader, and whatever walks through the value afterwards, takes without running out of its stack.
DEEPEST = 100
# Digits of a whole number: any of these is a float as well. (Tokenizers write 10**30 where nothing limits them.)
LONGEST_NUMBER = 300
# Half of a pair of UTF-16, which JSON can spell but no file or terminal can hold.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
TOO_DEEP = f"it is nested more than {DEEPEST} deep"
# Of a value in a message.
SHOWN = 60


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError for anything that is none, that is nested deeper than DEEPEST, and for whole numbers of more than
    LONGEST_NUMBER digits.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    _check_depth(value)
    if isinstance(text, str) and SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, for one without its other
    return value


def read_json(file: Path) -> Any:
    """The value in a file. Raises OSError where it cannot be read, ValueError as ``parse_json`` does."""
    return parse_json(file.read_text(encoding="utf-8"))


def read_object(file: Path, label: str) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError for anything else, in the words of the model ``label``."""
    try:
        value = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f'"{label}": {file.name} is damaged: {error}; copy it again') from error
    if not isinstance(value, dict):
        raise CheckpointError(f'"{label}": {file.name} is damaged: it holds no object ({{...}}); copy it again')
    return value


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(digits)} digits, more than {LONGEST_NUMBER}")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        inside = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [inner for part in inside for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(TOO_DEEP)


def wrong_values(error: ValidationError) -> str:
    """Which values a schema refuses, in a line: where the first is, what it should be, what it is, and how many."""
    found = error.errors(include_url=False)
    place = "".join(f"{part}." for part in found[0]["loc"])
    given = repr(found[0]["input"])
    shown = given if len(given) <= SHOWN else given[:SHOWN] + "..."
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    message = found[0]["msg"]
    no_value = found[0]["type"] in ("missing", "json_invalid")
    where = f"{place[:-1]}: " if place else ""
    return f"{where}{message[:1].lower()}{message[1:]}{'' if no_value else f', got {shown}'}{more}"
