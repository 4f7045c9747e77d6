"""Data of tasks from files, folders and the Hub, for a transformers model of a checkpoint directory.

Classifiers of text need a column of text and one of labels (numbers, or names that the model's configuration knows),
causal language models text only, encoder-decoder models a text and as its label the text to write. Classifiers of
images, and models of images and texts with the names of the classes, take folders of images by class, or images. Any
model takes its own inputs from an npz: ``input_ids``, ``pixel_values`` or ``input_features``, and ``labels``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, MissingExtraError, ParameterError, first_line
from ..storage.checkpoint import Checkpoint
from ..storage.run import current
from .batches import Columns, collator, labelled
from .classes import Classes, prompt_name
from .data import TaskData, kind_of, transformers_readout
from .images import describe, has_processor, image_processor
from .rows import Rows, read_rows
from .zeroshot import ZeroShot, can_name_images

TRANSFORMERS = 'transformers is missing ({}); pip install "tvbases-hf[demo]"'
CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
WRITERS = ("ForCausalLM", "LMHeadModel")
LOADERS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    **dict.fromkeys(WRITERS, "AutoModelForCausalLM"),
}
COLUMNS = Columns()
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class TaskModel:
    """A model with its head, and the directories, the first first, where its tokenizer and image processor are."""

    model: Any
    directories: tuple[Path, ...]

    @classmethod
    def load(
        cls, base: Checkpoint | str | Path, dtype: torch.dtype | str = torch.float32, device_map: str | None = None
    ) -> TaskModel:
        """The model that the directory's configuration names, without dropout.

        Raises:
            MissingExtraError: no transformers.
            ParameterError: a model that neither writes nor classifies.
            CheckpointError: a directory that transformers does not load, or without the head that it names.
        """
        base = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
        path = _directory(base)
        try:
            kind = class_of(base)
            how: dict[str, Any] = _locally() if device_map is None else {**_locally(), "device_map": device_map}
            with quiet_transformers():
                model, found = kind.from_pretrained(str(path), dtype=dtype, output_loading_info=True, **how)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, ParameterError):
                raise
            raise CheckpointError(f'"{base.label}" cannot be loaded by transformers: {first_line(error)}') from error
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise CheckpointError(
                f'"{base.label}" lacks {len(missing)} weights of a {architecture(base)} (first: {missing[0]}): what it '
                "answers would be random; give the model with its head"
            )
        return cls(model.eval(), (path,))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Raises CheckpointError where there is none."""
        from transformers import AutoTokenizer

        holders = [path for path in self.directories if any((path / file).is_file() for file in TOKENIZERS)]
        if not holders:
            raise CheckpointError(f'"{self.directories[0]}" holds no tokenizer, and text needs one; save it there')
        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(str(holders[0]), **_locally())
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(f'the tokenizer in "{holders[0]}" cannot be loaded: {first_line(error)}') from error

    @functools.cached_property
    def processor(self) -> Any:
        """Of images; see image_processor."""
        with quiet_transformers():
            return image_processor(self.directories, self.model.config)

    @property
    def is_classifier(self) -> bool:
        return kind_of(self.model).endswith(CLASSIFIERS)

    @property
    def names_images(self) -> bool:
        return not self.is_classifier and can_name_images(self.model)

    @property
    def input(self) -> str:
        """What an example is for the model: ``input_ids``, ``pixel_values`` or ``input_features``."""
        return "pixel_values" if self.names_images else str(self.model.main_input_name)

    def data(self, name: str, source: str | Rows, columns: Columns = COLUMNS) -> TaskData:
        """The data of one task, once the model has answered its first batch.

        Raises:
            ParameterError: rows without the columns needed, wrong labels, or what the model does not take.
            CheckpointError: a tokenizer or an image processor that is needed and absent.
        """
        rows = read_rows(name, source, columns.max_rows) if isinstance(source, str) else source
        classes, readout = columns.classes_of(name), transformers_readout
        if self.names_images:
            named = classes or _classes_of(name, rows, columns)
            names = named.names if classes else [prompt_name(known) for known in named.names]
            classes, readout = named, ZeroShot.of_names(self.model, self.tokenizer, names, columns.templates)
        elif self.is_classifier:
            classes = self._known(name, rows, classes)
        collate = collator(self, name, rows, columns)
        values = labelled(self, name, rows, columns, classes)
        data = TaskData.of_dataset(name, values, batch_size=columns.batch_size, collate=collate, readout=readout)
        self._try(data)
        return data

    def notes(self) -> list[str]:
        """What a user should know of how images are read, once some were."""
        unsaid = "processor" in vars(self) and not has_processor(self.directories)
        return [describe(self.processor)] if unsaid else []

    def _known(self, name: str, rows: Rows, given: Classes | None) -> Classes:
        """The labels of a classifier, in the order of its outputs."""
        own = Classes.of_model(self.model.config)
        if given is None:
            return own.called(rows.classes)
        if given.count != own.count:
            raise ParameterError(
                f'the data of "{name}": {given.count} names of classes for a model of {own.count} classes; give one '
                "for each, in the order of its outputs"
            )
        return given

    def _try(self, data: TaskData) -> None:
        """Data that the model does not take is known before the work, and said in one line."""
        batch = next(iter(data.batches))
        try:
            with torch.no_grad():
                logits, _ = data.readout(self.model, batch)
        except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError(
                f'the data of "{data.name}" is not what a {kind_of(self.model)} takes: {first_line(error)}'
            ) from error
        if logits.isnan().any():
            raise ParameterError(
                f'the model answers NaN to the data of "{data.name}", so nothing can be measured; where it is loaded '
                "in float16, --dtype float32 may help"
            )


def _directory(base: Checkpoint) -> Path:
    """Where the configuration is; beside a file with the name that transformers looks for."""
    path = Path(str(base.path))
    if not path.is_file():
        return path
    if path.name != "model.safetensors":
        raise CheckpointError(f'"{base.label}" is a file of weights; give a directory with the weights and config.json')
    return path.parent


def _locally() -> dict[str, Any]:
    """A model's files are on this disk, so the Hub is not asked, but for code that a model may name there."""
    local = not current().trust_remote_code
    return {"trust_remote_code": current().trust_remote_code, "local_files_only": local}  # None asks on a terminal


def class_of(base: Checkpoint) -> Any:
    """What loads the class that a checkpoint's configuration names, if it writes, classifies or compares.

    Raises MissingExtraError without transformers, ParameterError for another class, and what AutoConfig raises.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(TRANSFORMERS.format(error)) from error
    named = architecture(base)
    if loader := _loader(base):
        return getattr(transformers, loader)
    if not answers(base):
        with quiet_transformers():
            transformers.AutoConfig.from_pretrained(str(base.path), **_locally())  # an unknown type is said as such
        raise ParameterError(
            f'"{base.label}" is a {named}, which answers nothing that data could check; give a model that classifies '
            "texts or images, writes text, or compares images with texts, or a readout of your own in Python"
        )
    return getattr(transformers, named)


def architecture(base: Checkpoint) -> str:
    """The class that a checkpoint's configuration names first."""
    return str((base.config.get("architectures") or ["none"])[0])


def _loader(base: Checkpoint) -> str | None:
    """The Auto class for a checkpoint: they load code of the model's own, too, which says by which of them."""
    own = base.config.get("auto_map") or {}
    return next((auto for end, auto in LOADERS.items() if architecture(base).endswith(end) or auto in own), None)


def answers(base: Checkpoint) -> bool:
    """Whether a checkpoint's class is one that TaskModel loads."""
    import transformers

    named = architecture(base)
    kind: Any = getattr(transformers, named, None)
    if _loader(base) or not hasattr(kind, "from_pretrained"):
        return bool(_loader(base))
    compares = hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")
    return compares or bool(kind.can_generate())


def _classes_of(name: str, rows: Rows, columns: Columns) -> Classes:
    """Of images that are to be told apart by names: those that the source has."""
    labels = {str(row[columns.label]) for row in rows.values if isinstance(row.get(columns.label), str)}
    names = rows.classes or tuple(sorted(labels))
    if not names:
        raise ParameterError(
            f'the data of "{name}" does not name its classes, which this model tells apart by their names; give a file '
            "of them, one a line in the order of the labels, with --classes"
        )
    return Classes.named(names)


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
