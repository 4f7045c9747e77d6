"""Data of tasks from files and from the Hub, for a transformers model of a checkpoint directory.

``NAME=FILE.jsonl`` (or .json, .csv), or ``NAME=DATASET[:SPLIT]`` for a data set of the Hub. Classifiers need a column
of text and one of labels (numbers, or names that the model's configuration knows); causal language models text only.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, MissingExtraError, ParameterError, first_line
from ..storage.checkpoint import Checkpoint
from ..storage.json_files import parse_json
from ..storage.run import current
from .data import IGNORED, LABELS, TaskData

SUFFIXES = (".jsonl", ".json", ".csv")
TRANSFORMERS = 'transformers is missing ({}); pip install "tvbases-hf[demo]"'

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """How data is read: the names of its columns, and how many rows, rows a batch and tokens a row at most."""

    text: str = "text"
    label: str = "label"
    max_rows: int | None = None
    batch_size: int = 16
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("max_rows", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterError(f"{name.replace('_', '-')} must be 1 or more, got {value}")


@dataclass(frozen=True)
class TaskModel:
    """A base with its head, float32 and without dropout, and its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, base: Checkpoint) -> TaskModel:
        """The model that the directory's configuration names.

        Raises:
            MissingExtraError: no transformers.
            ParameterError: a model that neither predicts the next token nor classifies.
            CheckpointError: a directory that transformers does not load, or without the head that it names.
        """
        try:
            from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise MissingExtraError(TRANSFORMERS.format(error)) from error
        named = (base.config.get("architectures") or ["none"])[0]
        known = {"ForSequenceClassification": AutoModelForSequenceClassification}
        known |= dict.fromkeys(("ForCausalLM", "LMHeadModel"), AutoModelForCausalLM)
        loaders = [loader for suffix, loader in known.items() if named.endswith(suffix)]
        if not loaders:
            raise ParameterError(
                f'"{base.label}" is a {named}, which answers nothing that a file could check; give a model for '
                "sequence classification or a causal language model, or call measure_bounds with a readout of your own"
            )
        path = str(base.path)
        try:
            loader: Any = loaders[0]
            code = {"trust_remote_code": current().trust_remote_code}  # None asks on a terminal
            with quiet_transformers():
                model, found = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **code)
                tokenizer = AutoTokenizer.from_pretrained(path, **code)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f'"{base.label}" cannot be loaded by transformers: {first_line(error)}') from error
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise CheckpointError(
                f'"{base.label}" lacks {len(missing)} weights of a {named} (first: {missing[0]}): what it answers '
                "would be random; give the model with its head"
            )
        return cls(model.eval(), tokenizer)

    @property
    def is_classifier(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def data(self, name: str, source: str, columns: Columns = Columns()) -> TaskData:
        """The data of one task. Raises ParameterError for rows without the columns needed, or with wrong labels."""
        rows = read_rows(name, source)[: columns.max_rows]
        wanted = (columns.text, columns.label) if self.is_classifier else (columns.text,)
        _check_columns(name, rows, wanted)
        if self.is_classifier:
            labels = [self._label(name, number, row[columns.label]) for number, row in enumerate(rows, 1)]
            rows = [{**row, LABELS: label} for row, label in zip(rows, labels, strict=True)]
        return TaskData.of_dataset(name, rows, batch_size=columns.batch_size, collate=self._collate(columns))

    def _label(self, name: str, number: int, value: Any) -> int:
        config = self.model.config
        known = {str(label): int(index) for index, label in (config.id2label or {}).items()}
        index: Any = known.get(str(value), value)
        try:
            index = int(index)
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < config.num_labels:
            raise ParameterError(
                f'the data of "{name}", row {number}: {value!r} is not a label of this model; it knows 0 to '
                f"{config.num_labels - 1} ({', '.join(known) or 'without names'})"
            )
        return index

    def _collate(self, columns: Columns) -> Callable[[list[Row]], dict[str, Tensor]]:
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:  # GPT-2 and Llama have none; padded places do not count
            tokenizer.pad_token = tokenizer.eos_token

        def collate(rows: list[Row]) -> dict[str, Tensor]:
            texts = [str(row[columns.text]) for row in rows]
            options = {"padding": True, "truncation": True, "max_length": columns.max_tokens, "return_tensors": "pt"}
            batch = dict(tokenizer(texts, **options))
            known = _inputs_of(self.model)
            batch = {key: value for key, value in batch.items() if key in known}
            if self.is_classifier:
                return {**batch, LABELS: torch.tensor([row[LABELS] for row in rows])}
            return {**batch, LABELS: batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}

        return collate


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of transformers' own for a matter of milliseconds; its errors are ours to tell."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def read_rows(name: str, source: str) -> list[Row]:
    """The rows of a JSON lines, JSON or CSV file, or of a data set of the Hub.

    Raises:
        ParameterError: no such file, a line that is not a JSON object, no row.
        MissingExtraError: a data set of the Hub without ``datasets``.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() not in SUFFIXES and not path.is_file():
        rows = _from_hub(name, source)
    elif not path.is_file():
        raise ParameterError(f'the data of "{name}": there is no file "{source}"')
    elif path.suffix.lower() not in SUFFIXES:
        raise ParameterError(f'the data of "{name}": "{source}" is none of {", ".join(SUFFIXES)}')
    else:
        rows = _from_file(name, path)
    if not rows:
        raise ParameterError(f'the data of "{name}" is empty: "{source}" has no row')
    return rows


def _from_file(name: str, path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f'the data of "{name}": "{path}" cannot be read ({error})') from error
    match path.suffix.lower():
        case ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        case ".json":
            return _objects(name, path, _parsed(name, path, 0, text))
        case _:
            lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
            return _objects(name, path, [_parsed(name, path, number, line) for number, line in lines])


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


def _from_hub(name: str, source: str) -> list[Row]:
    dataset, _, split = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            f'the data of "{name}": "{source}" is no file, and a data set of the Hub needs datasets ({error}); '
            'pip install "tvbases-hf[eval]"'
        ) from error
    try:
        return list(load_dataset(dataset, split=split or "train"))  # type: ignore[arg-type]
    except Exception as error:  # whatever the Hub, the network or the data set's own reader raises
        raise ParameterError(
            f'the data of "{name}": "{source}" is neither a file nor a data set that can be had: {_first_line(error)}'
        ) from error


def _check_columns(name: str, rows: Sequence[Row], wanted: Sequence[str]) -> None:
    for column in wanted:
        lacking = [number for number, row in enumerate(rows, 1) if row.get(column) is None]
        if lacking:
            has = ", ".join(str(key) for key in rows[lacking[0] - 1])
            raise ParameterError(
                f'the data of "{name}" has no "{column}" in {len(lacking)} of {len(rows)} rows (first: row '
                f"{lacking[0]}, which has {has or 'nothing'}); name the column with --text-column or --label-column"
            )


def _inputs_of(model: nn.Module) -> set[str]:
    """What the model's forward takes: some tokenizers give token types to models that have none."""
    from inspect import signature

    return set(signature(model.forward).parameters)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
