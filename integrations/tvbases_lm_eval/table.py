"""The before/after table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tvbases_hf.sheet import Sheet

ARROWS = {True: " ↑", False: " ↓", None: ""}


def print_table(found: Mapping[str, Any], console: Console) -> None:
    """Metrics under the task that they belong to, one column per model; what could not be measured is a dash."""
    table = Sheet("", *found["models"], title=_title(found))
    latest = None
    for row in found["rows"]:
        if row["task"] != latest:
            if latest is not None:
                table.add_section()
            table.add_row(f"{row['role']} {row['task']}")
            latest = row["task"]
        cells = [_cell(row["values"].get(label)) for label in found["models"]]
        table.add_row(f"  {row['metric']}{ARROWS[row['higher_is_better']]}", *cells)
    console.print(table)


def _title(found: Mapping[str, Any]) -> str:
    parts = [] if found["scorer"] is None else [f"scorer {found['scorer']}", f"seed {found['seed']}"]
    parts += [] if found["limit"] is None else [f"the first {found['limit']} documents of each task"]
    return ", ".join(parts)


def _cell(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "-"
    value = f"{measured['value']:.4g}"
    return f"{value} ± {measured['stderr']:.2g}" if measured["stderr"] else value
