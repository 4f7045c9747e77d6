"""The models of one evaluation, one after another in the memory of one: the base, then what is compared with it.

A basis is evaluated task by task without writing a merged model: adapters are attached with PEFT and switched, vectors
of full checkpoints are added in place and taken away again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.basis.info import is_basis_directory
from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError, did_you_mean, first_line
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.models.adapter import is_adapter
from tvbases_hf.models.lora_config import read_config
from tvbases_hf.storage.files import WEIGHT_FILES, locate
from tvbases_hf.storage.run import current

BEFORE = "before"
AUTO = "auto"


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
    """A model by the name of its column; valid until the next one is asked for."""

    label: str
    model: Any
    tokenizer: Any


def variants(
    source: str, base: str | None = None, tasks: Sequence[str] | None = None, where: Where = Where()
) -> Iterator[Variant]:
    """The base as ``before``, then the model, or each task of a basis.

    Args:
        source: a checkpoint, an adapter or a basis directory, by path or Hub id.
        base: left out: what an adapter or a basis names; a checkpoint is then evaluated alone.
        tasks: of a basis; None for all of them.

    What can be wrong with the names is found at once, before anything is loaded.

    Raises:
        ParameterError: an unknown task, tasks of something that is no basis, or a base that nothing names.
        MissingExtraError: transformers or PEFT is not installed.
    """
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
            "causal language models here; give its task's data to `negate` or `grid_search` of tvbases_hf in Python"
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


def _basis(basis: Basis, base: str, tasks: Sequence[str], where: Where) -> Iterator[Variant]:
    model, tokenizer = load(base, where)
    yield Variant(BEFORE, model, tokenizer)
    if isinstance(basis, LoraBasis):
        attached = basis.attach(model, task=tasks[0])
        for task in tasks:
            basis.select(attached, task)
            yield Variant(task, attached, tokenizer)
        return
    place = InPlace(model, basis.names)
    for task in tasks:
        with place.changed(basis.reconstruct(task).__getitem__):
            yield Variant(task, model, tokenizer)


def _adapter(path: Path, base: str, source: str, where: Where) -> Iterator[Variant]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError(f'an adapter needs PEFT ({error}); pip install "tvbases-hf[peft]"') from error
    model, tokenizer = load(base, where)
    yield Variant(BEFORE, model, tokenizer)
    yield Variant(Path(source).name, PeftModel.from_pretrained(model, str(path)).eval(), tokenizer)


def _checkpoint(path: Path, base: str | None, source: str, where: Where) -> Iterator[Variant]:
    if base is not None:
        yield Variant(BEFORE, *load(base, where))
    yield Variant(Path(source).name, *load(path, where))


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
    if given or named:
        return given or named
    raise ParameterError(f'"{source}" does not name the model that it was made on; give it with --base')
