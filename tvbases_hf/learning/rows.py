"""Rows of data: from JSON lines, JSON, CSV, an npz, a folder of images by class, or a data set of the Hub.

Images stay where they are until they are asked for.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, ParameterError
from ..storage.files import home_path
from ..storage.json_files import parse_json
from .data import stratified

FILES = (".jsonl", ".json", ".csv", ".npz")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
SPLITS = {"train", "test", "val", "valid", "validation", "dev"}
IMAGE, LABEL = "image", "label"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """``classes`` are the names of the labels where the source knows them; ``arrays``: rows of an npz."""

    values: Sequence[Row]
    classes: tuple[str, ...] = ()
    arrays: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def has(self, column: str) -> bool:
        return all(row.get(column) is not None for row in self.values)


@dataclass(frozen=True)
class HubImage:
    """An image of a data set, decoded when it is opened."""

    dataset: Any
    row: int
    column: str

    def open(self) -> Any:
        return self.dataset[self.row][self.column]


def read_rows(name: str, source: str, limit: int | None = None) -> Rows:
    """The first ``limit`` rows; of a folder as many of every class, chosen at random with a fixed seed.

    A folder holds one folder of images per class, or images without labels; its rows have ``image`` and ``label``.

    Raises:
        ParameterError: no such file, a line that is not a JSON object, no row, a folder that is something else.
        MissingExtraError: a data set of the Hub without ``datasets``.
    """
    path = home_path(source)
    if path.is_dir():
        found = _from_folder(name, path, limit)
    elif path.suffix.lower() not in FILES and not path.is_file():
        found = _from_hub(name, source, limit)
    elif not path.is_file():
        raise ParameterError(f'the data of "{name}": there is no file "{source}"')
    elif path.suffix.lower() not in FILES:
        raise ParameterError(f'the data of "{name}": "{source}" is none of {", ".join(FILES)}')
    else:
        found = _from_file(name, path, limit)
    if not len(found):
        raise ParameterError(f'the data of "{name}" is empty: "{source}" has no row')
    return found


def _from_file(name: str, path: Path, limit: int | None) -> Rows:
    if path.suffix.lower() == ".npz":
        return _from_npz(name, path, limit)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f'the data of "{name}": "{path}" cannot be read ({error})') from error
    match path.suffix.lower():
        case ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines(keepends=True)))
        case ".json":
            rows = _objects(name, path, _parsed(name, path, 0, text))
        case _:
            lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
            rows = _objects(name, path, [_parsed(name, path, number, line) for number, line in lines])
    values: list[Row] = [_beside(path, row) for row in rows[:limit]]
    return Rows(values)


def _beside(file: Path, row: Any) -> Row:
    """Images are named relative to the file that names them."""
    return {**row, IMAGE: file.parent / row[IMAGE]} if isinstance(row.get(IMAGE), str) else row


def _parsed(name: str, path: Path, number: int, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        where = f" line {number}" if number else ""
        raise ParameterError(f'the data of "{name}": "{path}"{where} is not JSON ({error})') from error


def _objects(name: str, path: Path, values: Any) -> list[Row]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ParameterError(f'the data of "{name}": "{path}" does not hold one JSON object per row')
    return values


def _from_npz(name: str, path: Path, limit: int | None) -> Rows:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {str(key): file[key][:limit] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ParameterError(f'the data of "{name}": "{path}" cannot be read as arrays ({error})') from error
    lengths = {key: len(array) if array.ndim else 0 for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ParameterError(
            f'the data of "{name}": the arrays of "{path}" are not of one length '
            f"({', '.join(f'{key} {length}' for key, length in lengths.items())})"
        )
    names = {"images": IMAGE, "labels": LABEL}
    count = next(iter(lengths.values()), 0)
    columns = {names.get(key, key): array for key, array in arrays.items()}
    rows: list[Row] = [{key: _plain(array[i]) for key, array in columns.items()} for i in range(count)]
    return Rows(rows, arrays=True)


def _plain(value: Any) -> Any:
    """Numbers and texts as Python has them, arrays as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _from_folder(name: str, path: Path, limit: int | None) -> Rows:
    folders = sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    if folders and all(folder.name.lower() in SPLITS for folder in folders):
        raise ParameterError(
            f'the data of "{name}": "{path}" holds splits ({", ".join(folder.name for folder in folders)}), not '
            f'classes; give one of them, as "{folders[-1]}"'
        )
    rows: list[Row] = [{IMAGE: file, LABEL: folder.name} for folder in folders for file in _images(folder.rglob("*"))]
    loose = _images(path.iterdir())
    if rows and loose:
        raise ParameterError(
            f'the data of "{name}": "{path}" holds {len(loose)} images (first: {loose[0].name}) beside its folders, so '
            "they have no class; move them into the folder of their class"
        )
    if not rows:
        unlabelled: list[Row] = [{IMAGE: file} for file in loose]
        return Rows(unlabelled[:limit])
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in stratified([row[LABEL] for row in rows], limit)]
    return Rows(rows, tuple(folder.name for folder in folders))


def _images(files: Any) -> list[Path]:
    return sorted(file for file in files if file.suffix.lower() in IMAGES and not file.name.startswith("."))


def _from_hub(name: str, source: str, limit: int | None) -> Rows:
    dataset, _, split = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            f'the data of "{name}": "{source}" is no file, and a data set of the Hub needs datasets ({error}); '
            'pip install "tvbases-hf[eval]"'
        ) from error
    try:
        return of_dataset(load_dataset(dataset, split=split or "train"), limit)  # type: ignore[arg-type]
    except Exception as error:  # whatever the Hub, the network or the data set's own reader raises
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        raise ParameterError(
            f'the data of "{name}": "{source}" is neither a file nor a data set that can be had: {reason}'
        ) from error


def of_dataset(dataset: Any, limit: int | None) -> Rows:
    features = getattr(dataset, "features", None) or {}
    pictures = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    small = dataset.remove_columns(pictures) if pictures else dataset
    count = len(dataset) if limit is None else min(limit, len(dataset))
    rows: list[Row] = [
        {**small[i], **{column: HubImage(dataset, i, column) for column in pictures}} for i in range(count)
    ]
    names = [kind.names for kind in features.values() if type(kind).__name__ == "ClassLabel"]
    return Rows(rows, tuple(names[0]) if len(names) == 1 else ())
