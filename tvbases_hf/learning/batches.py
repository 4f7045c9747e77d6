"""Rows of data as batches of a model's inputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from ..defaults import TEMPLATE
from ..errors import ParameterError
from .classes import Classes
from .data import IGNORED, LABELS, bare, decodes, kind_of, writes
from .images import opened
from .rows import IMAGE, LABEL, Row, Rows
from .texts import CHOICES, MESSAGES, Written, is_written

Inputs = Callable[[list[Row]], dict[str, Tensor]]


class Asked(Protocol):
    """A model, and what makes its inputs; ``input`` is what an example is for it, by transformers' name."""

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def processor(self) -> Any: ...

    @property
    def is_classifier(self) -> bool: ...

    @property
    def names_images(self) -> bool: ...

    @property
    def input(self) -> str: ...


@dataclass(frozen=True)
class Columns:
    """How data is read: the names of its columns, and how many rows, rows a batch and tokens a row at most.

    ``classes`` {task: file with the names of its classes}, under "" that of every other task; ``templates`` are the
    texts that a model of images and texts is given of every name.
    """

    text: str = "text"
    label: str = LABEL
    max_rows: int | None = None
    batch_size: int = 16
    max_tokens: int = 512
    image: str = IMAGE
    classes: Mapping[str, str] = field(default_factory=dict)
    templates: Sequence[str] = (TEMPLATE,)

    def __post_init__(self) -> None:
        for name in ("max_rows", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterError(f"{name.replace('_', '-')} must be 1 or more, got {value}")

    def classes_of(self, name: str) -> Classes | None:
        file = self.classes.get(name, self.classes.get(""))
        return None if file is None else Classes.read(file)


def labelled(loaded: Asked, name: str, rows: Rows, columns: Columns, classes: Classes | None) -> Sequence[Row]:
    """The rows with a column LABELS where they have labels: numbers of classes, tokens, or texts to write.

    Raises ParameterError for labels that the model does not know, or that it needs and some rows lack.
    """
    targets = decodes(loaded.model)
    if classes is None and not targets:
        return rows.values
    column = columns.label if rows.has(columns.label) else LABEL
    if loaded.input != "input_ids" and not any(LABEL in row or column in row for row in rows.values):
        return rows.values  # enough where no labels are needed
    _check_column(name, rows, column)
    labels = [row[column] for row in rows.values]
    if classes is not None:
        labels = classes.numbers(name, labels)
    elif not isinstance(labels[0], str):
        _check_tokens(loaded, name, LABELS, labels, least=IGNORED)
    return [{**row, LABELS: label} for row, label in zip(rows.values, labels, strict=True)]


def collator(loaded: Asked, name: str, rows: Rows, columns: Columns) -> Inputs:
    """From rows to a batch, by what the rows hold. Raises ParameterError for rows that the model cannot be given."""
    if _answers(loaded, name, rows, columns):
        return Written(name, loaded.tokenizer, columns.text, columns.label, columns.max_tokens)
    read = _inputs(loaded, name, rows, columns)
    targets, reads_tokens = decodes(loaded.model), loaded.input == "input_ids"

    def collate(batch: list[Row]) -> dict[str, Tensor]:
        try:
            inputs = read(batch)
        except (ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, ParameterError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ParameterError(f'the data of "{name}" does not fit into a batch: {reason}') from error
        if LABELS in batch[0]:
            labels = [row[LABELS] for row in batch]
            inputs[LABELS] = _targets(loaded, labels, columns) if targets else torch.tensor(labels)
        elif reads_tokens and not loaded.is_classifier:
            mask = inputs.get("attention_mask")
            ids = inputs["input_ids"]
            inputs[LABELS] = ids.clone() if mask is None else ids.masked_fill(mask == 0, IGNORED)
        return inputs

    return collate


def _answers(loaded: Asked, name: str, rows: Rows, columns: Columns) -> bool:
    """Whether the rows say what a causal language model is to write."""
    if loaded.input != "input_ids" or not writes(loaded.model) or decodes(loaded.model) or rows.arrays:
        return False
    if any(is_written(row, columns.label) for row in rows.values):
        if any(row.get(MESSAGES) is None for row in rows.values):
            _check_column(name, rows, columns.text)
        return True
    if rows.has(columns.label):
        raise ParameterError(
            f'the data of "{name}": its column "{columns.label}" holds numbers (as {rows.values[0][columns.label]!r}), '
            f"and a {kind_of(loaded.model)} writes text; give the text of the answer there, or a column "
            f'"{CHOICES}" that the number is the place in, or name another column with --label-column'
        )
    return False


def _inputs(loaded: Asked, name: str, rows: Rows, columns: Columns) -> Inputs:
    known = _inputs_of(loaded)
    if rows.arrays and rows.has(loaded.input):
        kept = [key for key in rows.values[0] if key in known and key not in (LABELS, LABEL)]
        if loaded.input == "input_ids":
            _check_tokens(loaded, name, "input_ids", [row["input_ids"] for row in rows.values], least=0)
        return lambda batch: {key: torch.stack([torch.as_tensor(row[key]) for row in batch]) for key in kept}
    match loaded.input:
        case "pixel_values":
            column = columns.image if rows.has(columns.image) else IMAGE
            _check_column(name, rows, column, "--image-column")
            config = getattr(loaded.model.config, "vision_config", loaded.model.config)
            channels = getattr(config, "num_channels", 3)
            processor = loaded.processor

            def images(batch: list[Row]) -> dict[str, Tensor]:
                found = processor(opened([row[column] for row in batch], channels, name), return_tensors="pt")
                return {key: value for key, value in found.items() if key in known}

            return images
        case "input_ids":
            _check_column(name, rows, columns.text)
            return _texts(loaded, columns, known)
        case other:
            raise ParameterError(
                f'the data of "{name}": a {kind_of(loaded.model)} hears sound, which is not read from files; '
                f"give an npz with its {other}, as its feature extractor makes them, and labels"
            )


def _texts(loaded: Asked, columns: Columns, known: set[str]) -> Inputs:
    tokenizer = loaded.tokenizer
    if tokenizer.pad_token is None:  # GPT-2 and Llama have none; padded places do not count
        tokenizer.pad_token = tokenizer.eos_token
    options = {"padding": True, "truncation": True, "max_length": columns.max_tokens, "return_tensors": "pt"}

    def collate(batch: list[Row]) -> dict[str, Tensor]:
        found = tokenizer([str(row[columns.text]) for row in batch], **options)
        return {key: value for key, value in found.items() if key in known}

    return collate


def _targets(loaded: Asked, labels: list[Any], columns: Columns) -> Tensor:
    """[n, L] tokens to write, -100 where a row has ended. The token that decoding starts from is none of them."""
    if not isinstance(labels[0], str):
        return torch.stack([torch.as_tensor(label, dtype=torch.int64) for label in labels])
    found = loaded.tokenizer(
        text_target=[str(label) for label in labels], padding=True, padding_side="right", truncation=True,
        max_length=columns.max_tokens, return_tensors="pt", return_attention_mask=True,
    )  # fmt: skip
    ids = found["input_ids"].masked_fill(found["attention_mask"] == 0, IGNORED)
    start = getattr(loaded.model.config, "decoder_start_token_id", None)
    begun = start is not None and ids.shape[1] > 1 and bool((ids[:, 0] == start).all())
    return ids[:, 1:] if begun else ids


def _check_tokens(loaded: Asked, name: str, what: str, tokens: Sequence[Any], *, least: int) -> None:
    size = loaded.model.get_input_embeddings().num_embeddings
    for number, row in enumerate(tokens, 1):
        values = torch.as_tensor(row)
        bad = (values < 0) & (values != least) | (values >= size)
        if values.is_floating_point() or values.ndim != 1 or bool(bad.any()):
            raise ParameterError(
                f'the data of "{name}", row {number}: {what} are a list of tokens, 0 to {size - 1}'
                f"{f' or {IGNORED}' if least < 0 else ''}; got {values.flatten()[:5].tolist()}"
            )


def _check_column(name: str, rows: Rows, column: str, option: str = "--text-column or --label-column") -> None:
    lacking = [number for number, row in enumerate(rows.values, 1) if row.get(column) is None]
    if lacking:
        has = ", ".join(str(key) for key in rows.values[lacking[0] - 1])
        raise ParameterError(
            f'the data of "{name}" has no "{column}" in {len(lacking)} of {len(rows)} rows (first: row '
            f"{lacking[0]}, which has {has or 'nothing'}); name the column with {option}"
        )


def _inputs_of(loaded: Asked) -> set[str]:
    """What the model takes: some tokenizers give token types to models that have none."""
    asked = loaded.model.get_image_features if loaded.names_images else bare(loaded.model).forward
    return set(signature(asked).parameters)
