"""``tokenizer_source``, ``tokenizer`` and ``chat_template`` of a YAML: rows of tokens matched by name as in mergekit.

mergekit builds the tokenizer of the result and says where each of its tokens stands in every model; a model that lacks
a token gets the row that mergekit gives it. What comes out are models of one vocabulary, merged as any others.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import _set_chat_template
from mergekit.tokenizer import PermutedVocabulary, TokenizerInfo
from mergekit.tokenizer.build import build_tokenizer
from torch import Tensor

from tvbases_hf.errors import MismatchError, ParameterError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.fit import same_outputs
from tvbases_hf.models.vectors import Model
from tvbases_hf.models.vocabulary import token_axes
from tvbases_hf.storage import run
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.tensors import TensorInfo

from .configuration import one_line
from .mended import tokens_in_order

Files = dict[str, Path | bytes]


def made_files(config: MergeConfiguration, tokenizer: Any = None) -> Files | None:
    """The files of the tokenizer, with the chat template of the YAML, or that alone; None where it asks for neither.

    Raises ParameterError for a chat template that is none.
    """
    if tokenizer is None and not config.chat_template:
        return None
    holder: Any = tokenizer if tokenizer is not None else SimpleNamespace(chat_template=None)
    try:
        _set_chat_template(holder, config, trust_remote_code=run.current().trust_remote_code)
    except RuntimeError as error:
        raise ParameterError(
            f"chat_template: {one_line(error)}; give auto, the name of one that mergekit has, or a jinja template"
        ) from error
    if tokenizer is None:
        return {"chat_template.jinja": holder.chat_template.encode()} if holder.chat_template else None
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        files = [file for file in Path(place).rglob("*") if file.is_file()]
        return {file.relative_to(place).as_posix(): file.read_bytes() for file in files}


_MERGES: list[MergeConfiguration] = []


@contextlib.contextmanager
def merging(config: MergeConfiguration) -> Iterator[None]:
    """In the block mergekit merges by this YAML, whose tokens our methods cannot see from the tensors that they get."""
    _MERGES.append(config)
    try:
        yield
    finally:
        _MERGES.pop()


def tokens_merged() -> MergeConfiguration | None:
    """The YAML that mergekit merges by, where it asks for a tokenizer."""
    return _MERGES[-1] if _MERGES and asks_for_tokens(_MERGES[-1]) else None


def rows_cut() -> bool:
    """Whether only --unsafe-truncate-embeddings lets vocabularies differ, which drops the last rows."""
    return bool(_MERGES) and not asks_for_tokens(_MERGES[-1])


def asks_for_tokens(config: MergeConfiguration) -> bool:
    return bool(config.tokenizer or config.tokenizer_source)


def aligned(
    config: MergeConfiguration, reference: ModelReference, base: Checkpoint, models: Mapping[ModelReference, Model]
) -> tuple[Checkpoint, dict[str, Model], Any]:
    """All models with the rows of one tokenizer, as mergekit aligns them, and that tokenizer.

    Raises:
        ParameterError: a tokenizer that cannot be loaded, or tokens that mergekit refuses.
        MismatchError: an adapter that changes rows of tokens, or models that no row of a token can be found in.
    """
    base, opened = same_outputs(base, {str(ref): model for ref, model in models.items()})
    whole = {reference: base, **{r: m for r in models if isinstance(m := opened[str(r)], Checkpoint)}}
    axes = _axes(reference, base)
    if not axes:
        raise MismatchError(f'"{reference}": no embedding of tokens is known in it; leave the tokenizer out')
    for task, model in opened.items():
        names = [name for name in model.names if name in axes] if isinstance(model, Adapter) else []
        if names:
            raise MismatchError(
                f'"{task}" changes rows of tokens ({names[0]}), which only a whole model can match by name; merge it '
                "into its base first (PEFT's merge_and_unload)"
            )
    info = _built(config, list(whole))  # the others are adapters, with the tokens of the base
    alignment = _Alignment(config, info, whole, axes)
    views = {str(ref): alignment.view(ref) for ref in whole}
    return views[str(reference)], {task: views.get(task, model) for task, model in opened.items()}, info.tokenizer


def _axes(reference: ModelReference, model: Checkpoint) -> dict[str, int]:
    """{name: axis of the rows of tokens}, by mergekit's definition of the architecture, or by the names."""
    found = token_axes(model)
    try:
        architecture = arch_info_for_config(reference.config())
        weights = [] if architecture is None else architecture.all_weights(reference.config())
        known = {w.name: w.vocabulary_axis for w in weights if w.vocabulary_axis is not None}
    except Exception:  # whatever mergekit or transformers have against this model: the names tell then
        known = {}
    return {**found, **{name: axis for name, axis in known.items() if name in model.tensors}}


def _built(config: MergeConfiguration, models: list[ModelReference]) -> TokenizerInfo:
    """mergekit's own, the models in the order of the file."""
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    tokens = (config.tokenizer.tokens if config.tokenizer else None) or {}
    try:
        assert source is not None
        with tokens_in_order():
            return build_tokenizer(
                base_model=models[0],
                referenced_models=models,
                tokenizer_source=source,
                trust_remote_code=run.current().trust_remote_code,
                add_tokens=list(tokens),
            )
    except Exception as error:  # whatever transformers, tokenizers or mergekit have against these files
        raise ParameterError(
            f"the tokenizers of these models cannot be put together ({one_line(error)}); copy the tokenizer's files "
            "beside the weights, or leave tokenizer_source out"
        ) from error


@dataclass(frozen=True, eq=False)
class _Alignment:
    """Tensors of the vocabulary of all models, aligned one at a time: mergekit does it for all models together."""

    config: MergeConfiguration
    info: TokenizerInfo
    models: Mapping[ModelReference, Checkpoint]
    axes: Mapping[str, int]
    _ready: dict[str, dict[ModelReference, Tensor]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def view(self, reference: ModelReference) -> Checkpoint:
        """The model as it is after that, each of its tensors in its own dtype."""
        model, rows = self.models[reference], self._rows()

        def made(name: str, axis: int) -> tuple[TensorInfo, Callable[[], Tensor]]:
            info = model.tensors[name]
            shape = (*info.shape[:axis], rows, *info.shape[axis + 1 :])
            return TensorInfo(shape, info.dtype), lambda: self._read(reference, name).to(info.dtype)

        return model.with_made({name: made(name, axis) for name, axis in self.axes.items() if name in model.tensors})

    def _rows(self) -> int:
        count, multiple = len(self.info.tokenizer.get_vocab()), self._multiple or 1
        return -(-count // multiple) * multiple

    @property
    def _multiple(self) -> int | None:
        return self.config.tokenizer.pad_to_multiple_of if self.config.tokenizer else None

    def _read(self, reference: ModelReference, name: str) -> Tensor:
        """Each is handed out once and forgotten, so that the others wait no longer than they must."""
        with self._lock:
            if reference not in self._ready.get(name, {}):
                self._ready[name] = self._permuted(name)
            return self._ready[name].pop(reference)

    def _permuted(self, name: str) -> dict[ModelReference, Tensor]:
        task = PermutedVocabulary.model_construct(
            tokens=self.config.tokenizer.tokens if self.config.tokenizer else None,
            pad_to_multiple_of=self._multiple,
            base_model=self.config.base_model,
            vocabulary_axis=self.axes[name],
        )
        held = {ref: model.read(name) for ref, model in self.models.items() if name in model.tensors}
        try:
            with torch.device("cpu"):
                return dict(task.execute(self.info, held))
        except (AssertionError, KeyError, IndexError, ValueError, NotImplementedError) as error:
            raise ParameterError(
                f"mergekit cannot match the rows of {name} by token: {one_line(error) or type(error).__name__}; check "
                "tokens under tokenizer, and that no tokenizer names a token that its model has no row for"
            ) from error
