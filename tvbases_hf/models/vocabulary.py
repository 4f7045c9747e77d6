"""Vocabularies that differ: models with more or fewer rows of tokens than their base, made as long as one another.

A row means the token that stands there in every model that has the row: what one training run appended to the base's
own rows, or padding. Where tokens moved they are matched by name instead, as mergekit's ``tokenizer_source`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense, LowRank, dense
from ..algebra.dtypes import promoted
from ..defaults import ExtraRows
from ..errors import MismatchError
from ..storage.checkpoint import Checkpoint
from ..storage.side_files import side_files
from ..storage.tensors import TensorInfo
from ..storage.tied import is_output, is_token_matrix
from ..storage.tokens import tokens_of
from .adapter import Adapter

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rows:
    """What a tensor of the vocabulary is made to have: ``count`` rows, which lie along ``axis``."""

    axis: int
    count: int

    def of(self, info: TensorInfo, dtype: torch.dtype | None = None) -> TensorInfo:
        return TensorInfo(self.shape(info.shape, self.count), dtype or info.dtype)

    def shape(self, shape: Sequence[int], count: int) -> tuple[int, ...]:
        return (*shape[: self.axis], count, *shape[self.axis + 1 :])

    def level(self, own: Tensor, more: Callable[[int], Tensor]) -> Tensor:
        """The first rows of ``own``; where it has too few, what ``more(rows)`` has after these."""
        size = own.shape[self.axis]
        if size >= self.count:
            return own.narrow(self.axis, 0, self.count)
        return torch.cat([own, more(size).to(own.dtype)], dim=self.axis)

    def after(self, tensor: Tensor, size: int) -> Tensor:
        """The rows from ``size`` on, up to the last that is wanted."""
        stop = min(self.count, tensor.shape[self.axis])
        return tensor.narrow(self.axis, min(size, stop), max(0, stop - size))


def shapes_of(model: Checkpoint | Adapter) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a model holds whole, by the base's name."""
    if isinstance(model, Adapter):
        return model.saved_shapes
    return {name: info.shape for name, info in model.tensors.items()}


def vocabulary_size(model: Checkpoint) -> int | None:
    """The rows of its input embedding, or else of its output matrix; None for a model without tokens."""
    shapes = {name: shape for name, shape in shapes_of(model).items() if is_token_matrix(name, shape)}
    inputs = [shape for name, shape in shapes.items() if not is_output(name)]
    return next((shape[0] for shape in (*inputs, *shapes.values())), None)


def token_axes(model: Checkpoint) -> dict[str, int]:
    """{name: axis} of the tensors with a row for every token: embeddings, output matrices, and biases of the output."""
    shapes, size = shapes_of(model), vocabulary_size(model)
    matrices = [name for name, shape in shapes.items() if is_token_matrix(name, shape) and shape[0] == size]
    outputs = [name.removesuffix("weight") for name in matrices if is_output(name)]
    biases = {f"{module}bias" for output in outputs for module in (output, f"{output.rstrip('.').rpartition('.')[0]}.")}
    last = {name for name, shape in shapes.items() if name.endswith("final_logits_bias") and len(shape) == 2}
    found = {name: 0 for name in (*matrices, *biases) if name in shapes and shapes[name][0] == size}
    return found | {name: 1 for name in last if shapes[name][1] == size}


def differing_rows(ours: Shapes, theirs: Shapes) -> dict[str, int]:
    """{name: axis} of the tensors that differ because two vocabularies have different numbers of rows.

    Embeddings and output matrices tell both numbers; whatever else differs by just these (biases of the output, as
    [rows] or [1, rows]) belongs to them.
    """
    axes = {name: _axis(ours[name], shape) for name, shape in theirs.items() if name in ours and ours[name] != shape}
    found = {name: axis for name, axis in axes.items() if axis is not None}
    matrices = [name for name, axis in found.items() if axis == 0 and is_token_matrix(name, ours[name])]
    pairs = {(ours[name][0], theirs[name][0]) for name in matrices}
    return {name: axis for name, axis in found.items() if (ours[name][axis], theirs[name][axis]) in pairs}


def _axis(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The one axis along which two shapes differ."""
    if len(ours) != len(theirs):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 else None


def same_rows(
    base: Checkpoint,
    models: Mapping[str, Checkpoint | Adapter],
    extra_rows: ExtraRows | None,
    *,
    rows_of_base: bool = False,
) -> tuple[Checkpoint, dict[str, Checkpoint | Adapter], str]:
    """All with the rows of one vocabulary, where ``extra_rows`` says which; otherwise as they are. And a note on it.

    ``drop``: the common rows of all. ``keep``: those of the longest; a row that a model lacks is the base's there, and
    one that the base lacks is the mean of the models that have it, so that whoever lacks a row does not change it.
    ``rows_of_base``: the base stays as it is, for results that are changes of its own tensors.

    Raises MismatchError for ``keep`` where a row would get lost so.
    """
    ours, axes = shapes_of(base), {}
    for model in models.values():
        axes |= differing_rows(ours, shapes_of(model))
    if extra_rows is None or not axes:
        return base, dict(models), ""
    if rows_of_base and extra_rows == "keep":
        _check_none_lost(base, models, axes)
    if extra_rows == "keep":
        _check_same_tokens(models, axes, ours)
    shapes, choose = [ours, *map(shapes_of, models.values())], min if extra_rows == "drop" else max
    counts = {name: [shape[name][axis] for shape in shapes if name in shape] for name, axis in axes.items()}
    rows = {name: Rows(axis, ours[name][axis] if rows_of_base else choose(counts[name])) for name, axis in axes.items()}
    changed = {name: found for name, found in rows.items() if found.count != ours[name][found.axis]}
    level = base.with_made({n: (r.of(base.tensors[n]), _of_base(base, models, n, r)) for n, r in changed.items()})
    name, found = next(iter(rows.items()))
    note = f"vocabularies of {min(counts[name])} to {max(counts[name])} rows; {found.count} are merged ({name})"
    return level, {task: _levelled(model, level, rows) for task, model in models.items()}, note


def _check_same_tokens(models: Mapping[str, Checkpoint | Adapter], axes: Mapping[str, int], ours: Shapes) -> None:
    """MismatchError where two models mean different tokens by a row that the base lacks, as their tokenizers say."""
    first: dict[int, tuple[str, str]] = {}
    size = min(ours[name][axis] for name, axis in axes.items())
    for task, model in models.items():
        folder = model.directory if isinstance(model, Adapter) else model.path
        if folder is None or not folder.is_dir() or not any(name in axes for name in shapes_of(model)):
            continue
        for token, row in tokens_of(side_files(folder, check=False)).items():
            other, known = first.setdefault(row, (task, token)) if row >= size else (task, token)
            if known != token:
                raise MismatchError(
                    f'row {row} of the vocabulary is {known!r} in "{other}" and {token!r} in "{task}": their rows are '
                    "not of the same tokens; match them by name with `tokenizer_source: union` in a mergekit YAML, or "
                    "leave these rows out with --extra-rows drop"
                )


def _of_base(
    base: Checkpoint, models: Mapping[str, Checkpoint | Adapter], name: str, rows: Rows
) -> Callable[[], Tensor]:
    """What reads a tensor of the base with these rows."""

    def mean(size: int) -> Tensor:
        """Of the rows that models have and the base lacks, float64."""
        more = [rows.after(_whole(model, name), size) for model in models.values() if name in shapes_of(model)]
        longest = max(more, key=lambda part: part.shape[rows.axis])
        total, count = torch.zeros_like(longest, dtype=torch.float64), torch.zeros_like(longest, dtype=torch.float64)
        for part in more:
            total.narrow(rows.axis, 0, part.shape[rows.axis]).add_(part.to(torch.float64))
            count.narrow(rows.axis, 0, part.shape[rows.axis]).add_(1)
        return total / count

    return lambda: rows.level(base.read(name), mean)


def _levelled(model: Checkpoint | Adapter, base: Checkpoint, rows: Mapping[str, Rows]) -> Checkpoint | Adapter:
    if isinstance(model, Adapter):
        return LevelAdapter(model, base, rows)
    shapes = shapes_of(model)
    other = {n: found for n, found in rows.items() if n in shapes and shapes[n][found.axis] != found.count}
    return model.with_made({n: _of_model(model, base, n, found) for n, found in other.items()})


def _of_model(model: Checkpoint, base: Checkpoint, name: str, rows: Rows) -> tuple[TensorInfo, Callable[[], Tensor]]:
    """A tensor of a model with these rows: of what it lacks the base's, exactly."""
    dtype = promoted(model.tensors[name].dtype, base.tensors[name].dtype)
    read = lambda: rows.level(model.read(name).to(dtype), lambda size: rows.after(base.read(name), size))  # noqa: E731
    return rows.of(model.tensors[name], dtype), read


def _whole(model: Checkpoint | Adapter, name: str) -> Tensor:
    return model.saved(name) if isinstance(model, Adapter) else model.read(name)


class LevelAdapter(Adapter):
    """An adapter on a base whose vocabulary has been made as long as that of other models, or shorter."""

    def __init__(self, own: Adapter, base: Checkpoint, rows: Mapping[str, Rows]) -> None:
        self.__dict__.update(own.__dict__)
        self._own, self._level, self._rows = own, base, rows

    @property
    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        own = self._own.saved_shapes
        return {
            n: self._rows[n].shape(shape, self._rows[n].count) if n in self._rows else shape for n, shape in own.items()
        }

    def delta(self, name: str) -> Delta | None:
        rows = self._rows.get(name)
        if rows is None or name not in self.names:
            return self._own.delta(name)
        if name in self.saved_names:
            whole, base = self.saved(name), self._level.read(name)
            dtype = promoted(whole.dtype, base.dtype)
            return Dense(rows.level(whole.to(dtype), lambda size: rows.after(base, size)), base)
        change = self._own.delta(name)
        assert change is not None
        return _of_change(change, rows)


def _of_change(change: Delta, rows: Rows) -> Delta:
    """The change with these rows: those that the base did not have do not change."""

    def level(own: Tensor) -> Tensor:
        return rows.level(own, lambda size: own.new_zeros(rows.shape(own.shape, rows.count - size)))

    if change.factors is not None and rows.axis == 0:
        return LowRank(level(change.factors.left), change.factors.right)
    return Dense(level(dense(change)))


def _check_none_lost(base: Checkpoint, models: Mapping[str, Checkpoint | Adapter], axes: Mapping[str, int]) -> None:
    ours = shapes_of(base)
    for task, model in models.items():
        theirs = shapes_of(model)
        longer = [name for name, axis in axes.items() if name in theirs and theirs[name][axis] > ours[name][axis]]
        if longer:
            name, axis = longer[0], axes[longer[0]]
            raise MismatchError(
                f'"{task}": {theirs[name][axis] - ours[name][axis]} rows of {name} are not in the base ({base.label}), '
                "and what is written here are changes of the base's own rows; leave them out with --extra-rows drop, "
                f"or resize the base first: model.resize_token_embeddings({theirs[name][axis]})"
            )
