"""Every command on every architecture: the cells of COMPATIBILITY.md, and the page itself."""

from __future__ import annotations

import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

from tvbases_hf.version import library_version

from .commands import COLUMNS, Absent, Place, Refused, Wrong
from .family import make_family
from .small import Kind, find

MARKS = {"right": "✓", "refused": "refused", "wrong": "**wrong**", "crash": "**crash**", "absent": "–"}
LEAST_RIGHT = 0.95


@dataclass(frozen=True)
class Cell:
    """``verdict`` is one of MARKS; ``reason`` says why it is not right."""

    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One architecture: its cells by column, or why no small model of it could be made."""

    model_type: str
    architecture: str = ""
    cells: Mapping[str, Cell] | None = None
    unmade: str = ""


def row(model_type: str, columns: Sequence[str] = tuple(COLUMNS)) -> Row:
    """Make the models of one type, and run every command on them."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        try:
            kind = find(model_type)
            family = make_family(kind, Path(root))
        except Exception as error:  # whatever its class has against a small configuration, or against its own files
            return Row(model_type, unmade=_one_line(error))
        out = Path(root) / "out"
        out.mkdir()
        place = Place(family, out)
        return Row(model_type, _name(kind), {column: cell(column, place) for column in columns})


def cell(column: str, place: Place) -> Cell:
    try:
        COLUMNS[column](place)
    except Absent:
        return Cell("absent")
    except Refused as refusal:
        return Cell("refused", str(refusal).replace(f"{place.family.base.parent}/", ""))
    except Wrong as difference:
        return Cell("wrong", str(difference))
    except Exception:  # whatever it is, it is a defect
        return Cell("crash", traceback.format_exc())
    return Cell("right")


def defects(rows: Sequence[Row]) -> list[str]:
    """What the table must not hold; nothing where at least LEAST_RIGHT of the cells are right."""
    found = [
        f"{one.model_type}, {column}: {cell.verdict}: {cell.reason}"
        for one in rows
        for column, cell in (one.cells or {}).items()
        if cell.verdict in ("wrong", "crash")
    ]
    counts = _counts(rows)
    share = counts["right"] / max(1, sum(counts.values()))
    return found if share >= LEAST_RIGHT else [*found, f"{share:.1%} of the cells are right"]


def page(rows: Sequence[Row], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """COMPATIBILITY.md."""
    made, counts = [one for one in rows if one.cells is not None], _counts(rows)
    total = sum(counts.values())
    lines = [
        "# Compatibility",
        "",
        f"tvbases-hf {library_version()} with transformers {transformers.__version__}; `make compatibility` writes it: "
        "a small model of every architecture that transformers' own classes make, two fine-tunes of it, saved by "
        "`save_pretrained`, and every command run on them. A cell is right (✓) where the numbers are those of a dense "
        "float64 computation and the result loads in the model's class without a missing or unexpected weight; "
        "refused where the command said why, and wrote nothing; – where there is no text for such "
        "a model, or the small one cannot compute. Kernels of convolutions are no matrices to any method.",
        "",
        f"{len(made)} model types, {total} cells: {counts['right']} right ({counts['right'] / max(1, total):.1%}), "
        f"{counts['refused']} refused, {counts['wrong']} wrong, {counts['crash']} crashed.",
        "",
        *(f"* `{column}`: {_said(column)}" for column in columns),
        "",
        "| model type | class | " + " | ".join(columns) + " |",
        "|---|---|" + ":-:|" * len(columns),
    ]
    for one in made:
        marks = [MARKS[one.cells[column].verdict] for column in columns]  # type: ignore[index]
        lines.append(f"| {one.model_type} | {one.architecture} | " + " | ".join(marks) + " |")
    return "\n".join([*lines, *_reasons(made), *_unmade(rows)]) + "\n"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Refusals by what they say, numbers and names apart."""
    grouped: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for one in rows:
        for column, cell in (one.cells or {}).items():
            if cell.reason:
                kind = re.sub(r"\d+|\(first: [^)]*\)|for \w+;", "", cell.reason)
                grouped.setdefault((column, kind), []).append((one.model_type, cell.reason))
    lines = ["", "## Why", ""] if grouped else []
    for (column, _), found in grouped.items():
        names = ", ".join(name for name, _ in found)
        lines.append(f"* `{column}` of {names}. For example: {_one_line(found[0][1])}")
    return lines


def _unmade(rows: Sequence[Row]) -> list[str]:
    names = [one.model_type for one in rows if one.cells is None]
    if not names:
        return []
    return ["", "## Not in the table", "", f"Of {len(names)} types no small model could be made: {', '.join(names)}."]


def _counts(rows: Sequence[Row]) -> Counter[str]:
    found = Counter(cell.verdict for one in rows for cell in (one.cells or {}).values())
    del found["absent"]
    return found


def _said(column: str) -> str:
    return " ".join((COLUMNS[column].__doc__ or "").split())


def _name(kind: Kind) -> str:
    return kind.architecture.__name__


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:400].replace("|", "/")
