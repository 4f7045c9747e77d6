"""A basis of LoRA adapters: one adapter directory that gives every single task back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from .. import defaults
from ..algebra.delta import Delta
from ..algebra.rank import RankRule
from ..errors import ParameterError
from ..storage.checkpoint import Checkpoint, TensorInfo
from .adapters.lora_vectors import LoraVectors
from .adapters.some import some_tasks
from .adapters.task import TaskAdapter, task_adapter
from .adapters.verdict import adapter_card
from .basis import Basis
from .info import BasisInfo
from .library.card import library_card
from .library.vectors import LibraryVectors


class LoraBasis(Basis):
    """A Basis of adapters. Its directory is itself a stock PEFT LoRA: the sum of its vectors.

    Of many adapters it is a library (``info.library``): every task by itself, read from files of its own.
    """

    _source: LoraVectors | LibraryVectors

    @classmethod
    def holds(cls, info: BasisInfo) -> bool:
        return info.adapters is not None

    @classmethod
    def _opened(cls, path: Path, info: BasisInfo, label: str) -> LoraVectors | LibraryVectors:
        return (LibraryVectors if info.library else LoraVectors).open(path, info, label)

    def _card(self, info: BasisInfo) -> str:
        return library_card(info) if info.library else adapter_card(info)

    def terms(self, task: str, name: str, base: Checkpoint | None = None) -> list[tuple[float, Delta]]:
        if isinstance(self._source, LibraryVectors):
            return [(1.0, self._source.change(name, self.info.index(task)))]
        return super().terms(task, name, base)

    def reconstructions(self, name: str, base: Checkpoint | None = None) -> list[Delta]:
        return self.deltas(name) if self.info.library else super().reconstructions(name, base)

    def only(self, tasks: Sequence[str], *, base: str | Path | None = None) -> LoraBasis:
        """Some of the tasks as a basis in memory, every task by itself: what ``attach`` puts on a model.

        Its stock LoRA is their sum, times the alpha of this basis. ``base`` is read for DoRA only.
        """
        model = self._base(base)
        return LoraBasis(*some_tasks(self.info, self._source, tasks, lambda task, name: self.terms(task, name, model)))

    def _with_outputs(self, model: Checkpoint) -> Checkpoint:
        own = super()._with_outputs(model)
        assert self.info.adapters is not None
        biases = [name for name in self._source.whole if name in self.info.adapters.bias_modules]
        return own.with_biases({name: TensorInfo(self._source.shape(name), torch.float32) for name in biases})

    @property
    def source(self) -> LoraVectors:
        """The stored factors, for what puts them on a model. ParameterError for a library, which has too many."""
        if isinstance(self._source, LibraryVectors):
            raise ParameterError(
                f"a library of {len(self.tasks)} tasks goes onto a model in parts: "
                f"basis.only([{self.tasks[0]!r}, ...]).attach(model), which can switch between these"
            )
        return self._source

    def adapter(
        self,
        task: str | Mapping[str, float],
        *,
        alpha: float = 1.0,
        base: str | Path | None = None,
        rank: str | float | RankRule | None = None,
        equal_rank: bool = False,
        host: defaults.Host | None = None,
    ) -> TaskAdapter:
        """alpha * tau_hat of one task as a LoRA of its own. ``base`` is read for DoRA and for saved modules only.

        Args:
            task: or weights by task, for the LoRA of alpha * sum_t w_t tau_hat_t.
            rank: a rank rule for every module; None for the rank that the reconstruction has, and in a library for that
                of the adapter which it was made of.
            equal_rank: one rank in all modules, padded with zeros.
            host: what will load it (vllm, llama.cpp, diffusers, peft). ParameterError for what that cannot read.
        """
        label = self.info.called(task)
        if rank is None and self.info.library and isinstance(task, str):
            rank = self.info.library.members[self.info.index(task)].rank or None
        model = self._base(base)
        terms = lambda name: self.weighted(task, name, model)  # noqa: E731
        return task_adapter(self.info, self._source, label, terms, alpha, model, rank, equal_rank, host)

    def negate(self, task: str, alpha: float, **how: Any) -> TaskAdapter:
        """The LoRA that forgets a task: theta_0 - alpha * tau_hat; ``how`` as in ``adapter``."""
        return self.adapter(task, alpha=-alpha, **how)

    def attach(self, model: Any, task: str | None = None, *, adapter_name: str | None = None) -> Any:
        """All vectors as one LoRA of a transformers (or PEFT) model, set to ``task``; None for their sum, times alpha.

        Returns the PeftModel. See ``tvbases_peft.attach``.
        """
        return _host().attach(self, model, task, adapter_name=adapter_name)

    def select(self, model: Any, task: str | None, *, adapter_name: str | None = None) -> None:
        """Switch an attached basis to another task: nothing is loaded, one number changes."""
        _host().select(self, model, task, adapter_name=adapter_name)

    def mixed(
        self, model: Any, tasks: Sequence[str | None], *, repeat: int = 1, adapter_name: str | None = None
    ) -> AbstractContextManager[None]:
        """Inside, row i of every batch uses ``tasks[i]``; ``repeat``: beams or returned sequences per row."""
        return _host().mixed(self, model, tasks, repeat=repeat, adapter_name=adapter_name)


def _host() -> Any:
    """What puts a basis on a model announces itself by an entry point: this package knows no integration by name."""
    (found,) = entry_points(group="tvbases_hf.hosts", name="peft")
    return found.load()
