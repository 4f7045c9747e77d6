"""basis_config.json is what its schema says, and the page of the format shows that schema; `make tables` writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tvbases_hf.basis.info import basis_schema

PAGE = Path(__file__).parents[2] / "examples" / "guides" / "basis_format.md"
START, END = "<!-- schema: written by make tables -->\n", "<!-- end of schema -->\n"
BOUNDS = {"minimum": "at least {}", "exclusiveMinimum": "above {}", "minItems": "{} or more", "minLength": "not empty"}


def kind(part: Mapping[str, Any]) -> str:
    if "$ref" in part:
        return f"see {part['$ref'].rpartition('/')[2]}"
    if "anyOf" in part:
        return " or ".join(kind(option) for option in part["anyOf"])
    bounds = "".join(f", {words.format(part[key])}" for key, words in BOUNDS.items() if key in part)
    match part.get("type"):
        case "array":
            return f"list of ({kind(part['items'])})" + bounds
        case "object":
            inner = [*part.get("patternProperties", {}).values(), part.get("additionalProperties")]
            return f"name: ({kind(inner[0])})" if inner[0] not in (None, True) else "object"
    matching = f" `{part['pattern'].replace('|', chr(92) + '|')}`" if "pattern" in part else ""
    return f"{part.get('type', 'anything')}{matching}{bounds}"


def rows(title: str, part: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"\n**{title}**\n", "| key | is | needed |", "|---|---|---|")
    for name, value in part["properties"].items():
        yield f"| `{name}` | {kind(value)} | {'yes' if name in part['required'] else ''} |"


def test_the_page_of_the_format_shows_the_schema() -> None:
    schema, text = basis_schema(), PAGE.read_text(encoding="utf-8")
    parts = {"basis_config.json": schema, **schema["$defs"]}
    table = "\n".join(line for title, part in parts.items() for line in rows(title, part))
    before, rest = text.split(START)
    current = f"{before}{START}{table}\n\n{END}{rest.split(END)[1]}"
    if os.environ.get("TVBASES_WRITE_TABLES"):
        PAGE.write_text(current, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == current, "the schema has changed: run `make tables`"
