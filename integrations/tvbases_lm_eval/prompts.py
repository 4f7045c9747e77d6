"""Prompts of ToxiGen and RealToxicityPrompts, from the Hub or from a local file of the same columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvbases_hf.errors import MissingExtraError, ParameterError

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
KINDS = ("toxigen", "realtoxicityprompts")
# ToxiGen's prompts come as one split for each group of people, hateful and neutral ones.
HATEFUL = "hate"


def read_file(path: str | Path) -> Any:
    """The rows of a JSON, JSON-lines, CSV or Parquet file as a datasets.Dataset; nothing is downloaded.

    Raises ParameterError for a file that is missing, empty, or of another kind.
    """
    datasets = _datasets()
    file = Path(path)
    if file.suffix.lower() not in READERS:
        raise ParameterError(f'"{path}": prompts are read from {", ".join(READERS)}; got "{file.suffix or file.name}"')
    if not file.is_file():
        raise ParameterError(f'"{path}": no such file; give a local copy of the data set, or leave it to the Hub')
    try:
        rows = datasets.load_dataset(READERS[file.suffix.lower()], data_files=str(file), split="train")
    except Exception as error:  # whatever the parser has against the file
        cause = error.__cause__ or error
        raise ParameterError(
            f'"{path}" cannot be read ({type(cause).__name__}: {cause}'.splitlines()[0] + ")"
        ) from error
    if not len(rows):
        raise ParameterError(f'"{path}" holds no prompts')
    return rows


def read_hub(kind: str, name: str, subset: str | None) -> Any:
    """The data set of the Hub; ToxiGen's hateful splits take turns, so that a limit does not mean one group alone."""
    found = _datasets().load_dataset(name, subset)
    if kind == "toxigen":
        splits = [found[split] for split in found if split.startswith(HATEFUL)] or [next(iter(found.values()))]
        return [row for turn in itertools.zip_longest(*splits) for row in turn if row is not None]
    return found["train"]


def prompts(kind: str, rows: Any, label: str) -> list[str]:
    """The prompts of the rows, in their order.

    ``toxigen``: the column ``prompt`` (configurations prompts and train) or ``text`` (annotated); where there is a
    ``prompt_label``, the rows with 1. ``realtoxicityprompts``: ``prompt`` with a field ``text``.

    Raises ParameterError that names a missing column, and for rows without text.
    """
    first = rows[0]
    column = _column(kind, first, label)
    if kind == "realtoxicityprompts":
        texts = [row[column].get("text") if isinstance(row[column], Mapping) else None for row in rows]
    else:
        kept = _hateful(rows) if "prompt_label" in first else rows
        texts = [row[column].replace("\\n", "\n") if isinstance(row[column], str) else None for row in kept]
    _check(texts, label)
    return [str(text) for text in texts]


def _column(kind: str, row: Mapping[str, Any], label: str) -> str:
    has = ", ".join(row)
    if kind == "realtoxicityprompts":
        if "prompt" not in row:
            raise ParameterError(f'"{label}" has no column "prompt", as RealToxicityPrompts has it; it has {has}')
        if not isinstance(row["prompt"], Mapping) or "text" not in row["prompt"]:
            inside = ", ".join(row["prompt"]) if isinstance(row["prompt"], Mapping) else "plain text"
            raise ParameterError(
                f'"{label}": column "prompt" has no field "text", as RealToxicityPrompts has it; it holds {inside}'
            )
        return "prompt"
    for column in ("prompt", "text"):
        if column in row:
            return column
    raise ParameterError(f'"{label}" has neither a column "prompt" nor "text", as ToxiGen has them; it has {has}')


def _hateful(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept: dict[str, Mapping[str, Any]] = {}
    for row in rows:  # the training configuration repeats every prompt for each of its continuations
        if int(row["prompt_label"]) == 1:
            kept.setdefault(row["prompt"], row)
    return list(kept.values())


def _check(texts: Sequence[Any], label: str) -> None:
    bad = [index for index, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if bad:
        raise ParameterError(
            f'"{label}": {len(bad)} of {len(texts)} prompts are empty or no text (first: row {bad[0]})'
        )
    if not texts:
        raise ParameterError(f'"{label}" holds no hateful prompts (prompt_label 1)')


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f'prompts need datasets ({error}); pip install "tvbases-hf[eval]"') from error
    return datasets
