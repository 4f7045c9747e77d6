"""What the app does, without the app: tasks over a base, one weight each, tried on the model in memory and written."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from torch import Tensor

from tvbases_hf.algebra.sums import total
from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.errors import ParameterError, TvbasesError, first_line
from tvbases_hf.learning.coefficients import summed
from tvbases_hf.learning.inplace import Change, InPlace
from tvbases_hf.learning.taskfiles import TaskModel, quiet_transformers
from tvbases_hf.merging.merge import Merge
from tvbases_hf.merging.write import write
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.gram import gram_matrix
from tvbases_hf.models.layers import examine_layers
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.files import home_path, locate_named
from tvbases_hf.storage.run import find_device

from .beside import beside, can_be_beside

TOKENS = 60
METHOD = "task_arithmetic"
# What models and tokenizers raise for a text that they do not take, and what torch does where memory ends.
NOT_TAKEN = (ValueError, RuntimeError, IndexError, TypeError)
RESTORED = """from tvbases_hf import Basis

basis = Basis.from_pretrained({basis!r})
{call}"""


@dataclass
class Mixer:
    """T tasks over one base: theta_0 + sum_t w_t tau_t, its text, its recipe and its files.

    ``sources`` are the models by task, as they were named; of a basis directory, ``basis`` and its name ``place``
    instead; the model that writes is on ``device``. One thread at a time changes it.
    """

    vectors: Vectors
    sources: Mapping[str, str] = field(default_factory=dict)
    basis: Basis | None = None
    place: str = ""
    device: str = "cpu"
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls, base: str = "", tasks: Mapping[str, str] | None = None, basis: str = "", device: str = "cpu"
    ) -> Mixer:
        """Tasks by path or Hub id, or those of a basis directory, which may itself name the base.

        Raises ParameterError for neither or both, and whatever opening the models raises.
        """
        if bool(tasks) == bool(basis):
            raise ParameterError("give tasks, each as NAME=PATH_OR_ID, or a basis directory; not both, and not neither")
        if tasks:
            if not base:
                raise ParameterError("the tasks need the base that they were trained from")
            return cls(Vectors.open(base, tasks), dict(tasks), device=device)
        found = Basis.from_pretrained(basis)
        named = base or found.info.base_id
        if not named:
            raise ParameterError(f'"{basis}" does not name the model that it was made on; give the base')
        if not base:
            locate_named(named, basis)
        return cls(found.vectors(named, over="reconstructions"), {}, found, basis, device)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.vectors.tasks

    @property
    def holds_adapters(self) -> bool:
        """Whether a mix of them can be written as an adapter."""
        return self.vectors.are_adapters or isinstance(self.basis, LoraBasis)

    @functools.cached_property
    def similarities(self) -> list[list[str | float]]:
        """A row per task: its name, its length, and its cosine with every task."""
        gram = gram_matrix(self.vectors)
        rows = zip(self.tasks, gram.norms.tolist(), gram.cosine.tolist(), strict=True)
        return [[task, round(norm, 4), *(round(value, 3) for value in cosines)] for task, norm, cosines in rows]

    @functools.cached_property
    def shared(self) -> list[list[str | float]]:
        """A row per pair: the share of their energy in directions that both have, and what it would be by chance."""
        report = examine_layers(self.vectors)
        return [[pair, round(value, 3), round(report.chance[pair], 3)] for pair, value in report.shared.items()]

    def change(self, weights: Mapping[str, float]) -> Change:
        """sum_t w_t tau_t, one weight of the model at a time."""
        return summed(self._read, self._ordered(weights))

    def compare(self, prompt: str, weights: Mapping[str, float], tokens: int = TOKENS) -> tuple[str, str]:
        """What the base writes after a prompt, and what it writes with the weights; the likeliest token every time.

        Raises ParameterError for an empty prompt, less than one token, a base that writes no text, and a prompt that
        it cannot continue, such as one that is longer than what it can read.
        """
        if not prompt.strip():
            raise ParameterError("write a prompt for the models to continue")
        if tokens < 1:
            raise ParameterError(f"a text has at least one token; got {tokens}")
        change = self.change(weights)
        with self._turn:
            before = self._before(prompt, tokens)
            with self._changed(change):
                return before, self._continued(prompt, tokens)

    def recipe(self, weights: Mapping[str, float]) -> str:
        """The mix as a mergekit YAML; that of a basis directory, which mergekit does not read, as Python."""
        values = dict(zip(self.tasks, self._ordered(weights), strict=True))
        if self.basis is None:
            models = [{"model": self._source(task), "parameters": {"weight": w}} for task, w in values.items()]
            found = {"merge_method": METHOD, "base_model": self._base, "models": models, "dtype": "float32"}
            return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
        call = f"basis.restore({values!r}, {self._base!r}, 'merged')"
        if self.holds_adapters:
            call = f"basis.adapter({values!r}, base={self._base!r}).save_pretrained('merged')"
        return RESTORED.format(basis=self.place, call=call) + "\n"

    def save(self, out: str | Path, weights: Mapping[str, float], *, adapter: bool = False) -> Path:
        """Write the mix, as the recipe would: a checkpoint, or of adapters an adapter.

        Raises OutputError for a directory that is not ours, ParameterError for an adapter of full checkpoints.
        """
        scales, out = self._ordered(weights), home_path(out)
        if adapter and not self.holds_adapters:
            raise ParameterError("the tasks are full checkpoints, whose sum no adapter holds; write a checkpoint")
        if self.basis is None:
            combine = lambda _, deltas: total(deltas, scales)  # noqa: E731
            merge = Merge(self.vectors, combine, self.vectors.names, METHOD, self.recipe(weights))
            write(merge, out, as_adapter=adapter)
        elif adapter:
            assert isinstance(self.basis, LoraBasis)
            self.basis.adapter(dict(zip(self.tasks, scales, strict=True)), base=self._base).save_pretrained(out)
        else:
            self.basis.restore(dict(zip(self.tasks, scales, strict=True)), self._base, out)
        return out

    @property
    def _base(self) -> str:
        return str(self.vectors.base.label)

    def _source(self, task: str) -> str:
        """As mergekit names it: an adapter with its base."""
        source = str(self.sources[task])
        is_adapter = isinstance(self.vectors.models[task], Adapter) and "+" not in source
        return f"{self._base}+{source}" if is_adapter else source

    def _ordered(self, weights: Mapping[str, float]) -> list[float]:
        unknown = [name for name in weights if name not in self.tasks]
        values = [_number(weights.get(task, 0.0)) for task in self.tasks]
        if unknown or not torch.tensor(values).isfinite().all():
            raise ParameterError(f"a weight is a number for one of {', '.join(self.tasks)}; got {dict(weights)!r}")
        return values

    @functools.cached_property
    def _read(self) -> Vectors:
        """The vectors; factors of adapters stay in memory, so that a slider reads no files."""
        if not self.holds_adapters:
            return self.vectors
        kept = functools.cache(self.vectors.read)
        return replace(self.vectors, read=kept)

    @functools.cached_property
    def _model(self) -> TaskModel:
        silent = ParameterError(f"{self._base} writes no text, so there are no generations to compare")
        try:
            found = TaskModel.load(self.vectors.base)
        except ParameterError as error:
            raise silent from error
        if found.input != "input_ids" or not found.model.can_generate():
            raise silent
        found.model.to(find_device(self.device))
        return found

    def _changed(self, change: Change) -> AbstractContextManager[Any]:
        """The model with the change: beside its layers where that can be, else in its weights."""
        model, names = self._model.model, self.vectors.names
        if self.holds_adapters and can_be_beside(model, names, change):
            return beside(model, names, change)
        return self._in_place.changed(change)

    @functools.cached_property
    def _in_place(self) -> InPlace:
        return InPlace(self._model.model, self.vectors.names)

    @functools.cached_property
    def _before(self) -> Any:
        return functools.lru_cache(maxsize=64)(self._continued)

    def _continued(self, prompt: str, tokens: int) -> str:
        model, tokenizer = self._model.model, self._model.tokenizer
        try:
            with quiet_transformers():
                return _written(model, tokenizer, prompt, tokens)
        except TvbasesError:
            raise
        except (*NOT_TAKEN, TemplateError) as error:
            kind = type(model).__name__
            raise ParameterError(f"a {kind} cannot continue this prompt: {first_line(error)}") from error


def _number(given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError):
        return float("nan")


@torch.no_grad()
def _written(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The likeliest continuation; of a model with a chat template, its answer to the prompt."""
    text = prompt
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    kept = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    written = model.generate(**kept, max_new_tokens=tokens, do_sample=False, logits_processor=[_refuse_nan])
    start = 0 if model.config.is_encoder_decoder else kept["input_ids"].shape[1]
    return tokenizer.decode(written[0, start:], skip_special_tokens=True).strip()


def _refuse_nan(_: Tensor, logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise ParameterError("with these weights the model computes NaN, which is no text; give smaller ones")
    return logits
