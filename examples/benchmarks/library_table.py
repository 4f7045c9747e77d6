"""What bench_library.py measured, as lines on a terminal and as a page."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from evidence.markdown import table

from tvbases_hf.version import library_version

Row = Mapping[str, Any]
COLUMNS = ("bytes, %", "squared error", "seconds", "memory, GB", "add one, s", "one back, s")


def show(row: Row) -> None:
    print(f"{name_of(row):28}", f"{row['failed']}" if "failed" in row else "  ".join(_cells(row)), flush=True)


def name_of(row: Row) -> str:
    how = f", {row['components']} components" if row.get("components") else ""
    return row["package"] + how + (f", {row['bits']} bits" if row.get("bits") else "")


def _cells(row: Row) -> list[str]:
    numbers = (row["seconds"], row["memory"] / 1e9, row["add_seconds"], row["restore_seconds"])
    cells = [f"{row['share']:.2%}".rstrip("%"), f"{row['error']:.2g}", *(f"{number:.1f}" for number in numbers)]
    return cells + ([f"{row['accuracy']:.1f}"] if "accuracy" in row else [])


def results(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    where = f"tvbases-hf {library_version()}, torch {torch.__version__}, Python {platform.python_version()}"
    parts = [
        "# Libraries of adapters",
        "Written by `bench_library.py --write`; do not edit.",
        f"{where}, {os.cpu_count()} processor cores. Bytes are those of all files, as a share of the adapters'; errors "
        "are means over the adapters of |Δ - Δ'|² / |Δ|², Δ the change that an adapter makes of all weights. Every "
        "program ran in a process of its own. vlora-dev 1.0.0 and lorashare 0.1.3 keep the numbers of components that "
        "are named; below each, tvbases-hf at the same share of the bytes. They hold all adapters in memory. "
        "Where they are better is time: vlora-dev compresses trained adapters, and both compress the thousand in one "
        "layer, in less of it; vlora-dev unquantised, and lorashare, also restore a trained adapter faster. Seconds "
        "were taken while other programs ran, the thousand in one layer on one core; the thousand in 30 layers alone.",
    ]
    for report in reports:
        parts += [f"## {report['what'][0].upper()}{report['what'][1:]}", *_section(report)]
    return "\n\n".join(parts) + "\n"


def _section(report: Mapping[str, Any]) -> Iterable[str]:
    rows = report["rows"]
    yield f"{report['whole'] / 1e6:.0f} MB before." + (
        f" Each task with its own adapter: {report['accuracy']:.1f} % right on the test prompts of bench_llm.py."
        if "accuracy" in report
        else ""
    )
    measured = any("accuracy" in row for row in rows)
    headers = ["", *COLUMNS, *(["own accuracy, %"] if measured else []), "their error / ours"]
    width = len(headers) - 2
    cells = []
    for row in rows:
        if "failed" in row:
            cells.append([name_of(row), row["failed"], *[""] * width])
        else:
            ratio = f"{rows[row['beside']]['error'] / row['error']:.1f}" if "beside" in row else ""
            cells.append([name_of(row), *_cells(row), ratio])
    yield table(headers, cells)
    used = [f"{row['cpu_seconds']:.0f}" for row in rows if "cpu_seconds" in row]
    if used:
        yield f"Processor seconds of tvbases-hf, row by row in all its threads: {', '.join(used)}."
    beside = [(rows[row["beside"]], row) for row in rows if "beside" in row and "failed" not in row]
    if beside:
        yield _verdict(beside)


def _verdict(beside: Sequence[tuple[Row, Row]]) -> str:
    """At how many of the shares our error is a tenth of theirs, and where it is not."""
    less = [
        f"{name_of(theirs)} ({theirs['share']:.0%}: {theirs['error'] / own['error']:.1f} times)"
        for theirs, own in beside
        if theirs["error"] < 10 * own["error"]
    ]
    said = f"Our error is at most a tenth of theirs at {len(beside) - len(less)} of {len(beside)} shares"
    return said + (f"; not beside {', '.join(less)}." if less else ".")
