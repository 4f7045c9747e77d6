"""The models of one evaluation, one after another in the memory of one: the base, then what is compared with it.

A basis is evaluated task by task without writing a merged model: adapters are attached with PEFT and switched, vectors
of full checkpoints are added in place and taken away again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.basis.info import is_basis_directory
from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError, did_you_mean, first_line
from tvbases_hf.learning.data import writes
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.learning.negation import change_of
from tvbases_hf.learning.taskfiles import WRITERS, TaskModel, answers
from tvbases_hf.models.adapter_files import adapter_folder, is_adapter
from tvbases_hf.models.lora_config import check_expressions, read_config
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.files import WEIGHT_FILES, local_path, locate, locate_named
from tvbases_hf.storage.run import current

BEFORE = "before"
AUTO = "auto"
CONFIG = "config.json"


@dataclass(frozen=True)
class Where:
    """Where models live: a device (None: a GPU if there is one) and a dtype (None: the stored one).

    The device ``auto`` lets accelerate spread the model over all GPUs, and put on the CPU or the disk what is left.
    """

    device: str | None = None
    dtype: torch.dtype | None = None

    @property
    def place(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Variant:
    """A model by the name of its column; valid until the next one is asked for.

    ``directories`` are where its tokenizer and its image processor are; ``tokenizer`` is that of a language model.
    """

    label: str
    model: Any
    tokenizer: Any
    directories: tuple[Path, ...] = ()

    def named(self, label: str, model: Any = None) -> Variant:
        return replace(self, label=label, model=self.model if model is None else model)


def variants(
    source: str, base: str | None = None, tasks: Sequence[str] | None = None, where: Where = Where()
) -> Iterator[Variant]:
    """The base as ``before``, then the model, or each task of a basis.

    Args:
        source: a checkpoint, an adapter or a basis directory, by path or Hub id, or ``base+adapter``.
        base: left out: what an adapter or a basis names; a checkpoint is then evaluated alone.
        tasks: of a basis; None for all of them.

    What can be wrong with the names is found at once, before anything is loaded.

    Raises:
        ParameterError: an unknown task, tasks of something that is no basis, a base that nothing names, or another
            than that of ``base+adapter``.
        MissingExtraError: transformers or PEFT is not installed.
    """
    below, plus, adapter = source.partition("+")
    if plus and not local_path(source):
        if base is not None and locate(base).resolve() != locate(below).resolve():
            raise ParameterError(f'"{source}": the adapter is on {below}, and --base is {base}; leave --base out')
        return _adapter(adapter_folder(locate(adapter)), base or below, adapter, where)
    path = locate(source)
    if is_basis_directory(path):
        basis = Basis.from_pretrained(path)
        chosen = _chosen(basis, tasks, source)
        return _basis(basis, _base(base, basis.info.base_id, source), chosen, where)
    if tasks:
        raise ParameterError(f'"{source}" is no basis, so it has no task "{tasks[0]}"; leave --task out')
    if is_adapter(path) and not any((path / name).is_file() for name in WEIGHT_FILES):
        named = str(read_config(path, source).get("base_model_name_or_path") or "")
        return _adapter(path, _base(base, named, source), source, where)
    return _checkpoint(path, base, source, where)


def load(source: str | Path, where: Where) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, ready for evaluation. Raises CheckpointError if there is none."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(f'evaluation needs transformers ({error}); pip install "tvbases-hf[eval]"') from error
    path = locate(str(source))
    try:
        with _no_bars():
            code = {"trust_remote_code": current().trust_remote_code}  # None asks on a terminal
            spread = code | ({"device_map": "auto"} if where.place == AUTO else {})
            model = AutoModelForCausalLM.from_pretrained(path, dtype=where.dtype or "auto", **spread)
        tokenizer = AutoTokenizer.from_pretrained(path, **code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f'"{source}" cannot be loaded as a causal language model ({first_line(error)})'
        ) from error
    if getattr(model.config, "is_encoder_decoder", False):
        raise CheckpointError(
            f'"{source}" is an encoder with a decoder ({model.config.model_type}), and lm-eval tasks are measured of '
            "causal language models here; give its task's data with --data NAME=FILE"
        )
    if where.place != AUTO:
        model.to(torch.device(where.place))  # type: ignore[arg-type]
    return model.eval(), tokenizer


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers shows a bar for weights that are read in a moment, also in a pipe."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def opened(label: str, source: str | Path, where: Where, spare: tuple[Path, ...] = ()) -> Variant:
    """A model of the class that its configuration names; a language model where that names none.

    ``spare`` directories are looked at for what its own does not hold: tokenizers and image processors. Raises
    CheckpointError as ``load`` and TaskModel.load do.
    """
    path = locate(str(source))
    if is_language_model(path):
        return Variant(label, *load(source, where), (path, *spare))
    spread = "auto" if where.place == AUTO else None
    loaded = TaskModel.load(Checkpoint.open(path, label=str(source)), where.dtype or "auto", device_map=spread)
    if spread is None:
        loaded.model.to(torch.device(where.place))
    directories = (path, *spare)
    of_text = writes(loaded.model) and loaded.input == "input_ids"
    tokenizer = TaskModel(loaded.model, directories).tokenizer if of_text else None
    return Variant(label, loaded.model, tokenizer, directories)


def is_language_model(path: Path) -> bool:
    """By its configuration: a causal one, of its own code too, or one that names no class."""
    file = path / CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = (config.get("architectures") or [""])[0]
    return not named or named.endswith(WRITERS) or "AutoModelForCausalLM" in (config.get("auto_map") or {})


def _basis(basis: Basis, base: str, tasks: Sequence[str], where: Where) -> Iterator[Variant]:
    before = opened(BEFORE, base, where)
    yield before
    if isinstance(basis, LoraBasis):
        attached = basis.attach(before.model, task=tasks[0])
        for task in tasks:
            basis.select(attached, task)
            yield before.named(task, attached)
        return
    place = InPlace(before.model, basis.names)
    for task in tasks:
        with place.changed(basis.reconstruct(task).__getitem__):
            yield before.named(task)


def _adapter(path: Path, base: str, source: str, where: Where) -> Iterator[Variant]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError(f'an adapter needs PEFT ({error}); pip install "tvbases-hf[peft]"') from error
    before = opened(BEFORE, base, where)
    check_expressions(read_config(path, source), [name for name, _ in before.model.named_modules()], source)
    yield before
    yield before.named(Path(source).name, PeftModel.from_pretrained(before.model, str(path)).eval())


def _checkpoint(path: Path, base: str | None, source: str, where: Where) -> Iterator[Variant]:
    label = Path(source).name
    if base is None:
        yield opened(label, path, where)
        return
    before = opened(BEFORE, base, where)
    yield before
    if is_language_model(path) or answers(Checkpoint.open(path, label=source)):
        yield opened(label, path, where, before.directories)
        return
    # A part of the base, such as CLIP's tower of images alone: the rest is the base's.
    vectors = Vectors.open(base, {label: source})
    with InPlace(before.model, vectors.names).changed(change_of(vectors, label)):
        yield before.named(label)


def _chosen(basis: Basis, tasks: Sequence[str] | None, source: str) -> list[str]:
    chosen = list(tasks or basis.tasks)
    unknown = [task for task in chosen if task not in basis.tasks]
    if unknown:
        raise ParameterError(
            f'"{source}" has no task "{unknown[0]}"{did_you_mean(unknown[0], basis.tasks)}; '
            f"it has {', '.join(basis.tasks)}"
        )
    return chosen


def _base(given: str | None, named: str, source: str) -> str:
    if given:
        return given
    if named:
        locate_named(named, source)
        return named
    raise ParameterError(f'"{source}" does not name the model that it was made on; give it with --base')
