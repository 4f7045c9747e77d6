"""One more task for an online basis: a fine-tune, an adapter, or a task vector as such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense
from ..errors import CheckpointError, MismatchError
from ..models.gram import not_finite
from ..models.vectors import Model, Vectors, open_model
from ..storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Changes:
    """One task's change of every weight of the base, zero where it has none. ``given``: by name, or of one model."""

    base: Checkpoint
    task: str
    given: Vectors | Mapping[str, Tensor]

    def __call__(self, name: str) -> Delta:
        if isinstance(self.given, Vectors):
            return self.given.deltas(name)[0] if name in self.given.names else self._none(name)
        return Dense(self.given[name].detach().cpu()) if name in self.given else self._none(name)

    def _none(self, name: str) -> Delta:
        return Dense(torch.zeros(self.base.tensors[name].shape))

    def not_finite(self, name: str) -> CheckpointError:
        """What to say of NaN or infinity in this weight."""
        if isinstance(self.given, Vectors):
            return not_finite(self.given, name, self.given.deltas(name))
        return CheckpointError(f'"{self.task}": tensor {name} of the task vector holds NaN or infinity')


def changes_of(base: Checkpoint, task: str, model: str | Path | Model | Mapping[str, Tensor]) -> Changes:
    """A model's changes, opened and checked.

    Raises MismatchError, CheckpointError for a model that does not fit the base, or tensors that it does not have.
    """
    if isinstance(model, Mapping):
        _check(base, task, model)
        return Changes(base, task, model)
    opened = open_model(model, base) if isinstance(model, (str, Path)) else model
    vectors = Vectors.of_models(base, {task: opened})
    vectors.base.check_storable()
    return Changes(base, task, vectors)


def _check(base: Checkpoint, task: str, changes: Mapping[str, Tensor]) -> None:
    known = {name: info.shape for name, info in base.tensors.items() if info.dtype.is_floating_point}
    bad = [name for name, tensor in changes.items() if known.get(name) != tuple(tensor.shape)]
    if bad or not changes:
        raise MismatchError(
            f'"{task}": {len(bad)} of {len(changes)} changes are of tensors that the base ({base.label}) does not have '
            f"in this shape (first: {bad[0] if bad else 'there is no change at all'})"
        )
