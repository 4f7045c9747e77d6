"""K named vectors over one base, none of them in memory: task vectors, bases, reconstructions.

These are the same thing to a merging method. What tells them apart is ``encoder``: how much of each task is in each
vector, which is also how statistics of the tasks' data are mixed (AE paper, Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense, zeros
from ..algebra.sums import mix
from ..bases import BasisWeights
from ..defaults import ExtraRows
from ..errors import MismatchError, ParameterError
from ..storage import run
from ..storage.checkpoint import Checkpoint
from ..storage.files import local_path, locate
from ..text import printable
from .adapter import Adapter
from .adapter_files import adapter_folder, is_adapter
from .finite import finite_values
from .fit import Coverage, check_fit, same_outputs
from .towers import placed
from .vocabulary import same_rows

Model = Checkpoint | Adapter
OVER = ("bases", "reconstructions")


@dataclass(frozen=True)
class Vectors:
    """K vectors of T tasks over the tensors of one base.

    ``names`` are the weights that they change, ``labels`` [K] what they are called, ``encoder`` [T, K] float64 the
    share of every task in every vector (the identity for task vectors and for reconstructions), ``read(name)`` the K
    changes of one weight. ``models`` are what task vectors were opened from (also those that bases are mixed of), and
    ``device`` is where changes are, and so whatever is computed of them.
    """

    base: Checkpoint
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    encoder: Tensor
    read: Callable[[str], list[Delta]]
    models: Mapping[str, Model] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def open(
        cls,
        base: str | Path,
        tasks: Mapping[str, str | Path],
        *,
        device: str | torch.device = "cpu",
        extra_rows: ExtraRows | None = None,
        rows_of_base: bool = False,
    ) -> Vectors:
        """Task vectors of checkpoints or adapters by path or Hub id; see open_model, of_models and find_device."""
        place = run.find_device(device) if isinstance(device, str) else device
        opened = Checkpoint.open(base)
        models = {task: open_model(source, opened) for task, source in tasks.items()}
        vectors = cls.of_models(opened, models, device=place, extra_rows=extra_rows, rows_of_base=rows_of_base)
        return replace(vectors, coverage=replace(vectors.coverage, twice=_given_twice(tasks)))

    @classmethod
    def of_models(
        cls,
        base: Checkpoint,
        models: Mapping[str, Model],
        *,
        skip_mismatched: bool = False,
        device: str | torch.device = "cpu",
        extra_rows: ExtraRows | None = None,
        rows_of_base: bool = False,
    ) -> Vectors:
        """Task vectors tau_i = theta_i - theta_0, once every model is known to fit the base, or one of its towers.

        ``names`` are the floating-point tensors of the base, in its order, of adapters those that one of them changes;
        integer buffers carry no task vector.

        Args:
            base: the pretrained model.
            models: fine-tuned models or adapters by task name, in the order of the Gram matrix.
            skip_mismatched: leave out tensors whose shapes differ instead of raising.
            device: where each weight's changes are moved to when they are read; see storage.run.find_device.
            extra_rows: of vocabularies of other lengths: ``drop`` for the common rows, ``keep`` for those of the
                longest; None refuses them. ``rows_of_base``: the base keeps its own; see models.vocabulary.

        Raises:
            ParameterError: no task.
            MismatchError: another architecture, tensors of other shapes, or quantised ones.
        """
        models = {task: placed(m, base) if isinstance(m, Checkpoint) else m for task, m in models.items()}
        base, models = same_outputs(base, models)
        base = _with_new_biases(base, models)
        base, models, note = same_rows(base, models, extra_rows, rows_of_base=rows_of_base)
        coverage = replace(check_fit(base, models, skip_mismatched), rows=note)
        place = torch.device(device)
        return cls(
            base,
            tasks=tuple(models),
            labels=tuple(models),
            names=coverage.names,
            encoder=torch.eye(len(models), dtype=torch.float64),
            read=lambda name: _changes(base, models, name, place),
            models=dict(models),
            coverage=coverage,
            device=place,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def are_adapters(self) -> bool:
        """Whether every model is an adapter."""
        return bool(self.models) and not any(isinstance(model, Checkpoint) for model in self.models.values())

    @property
    def numel(self) -> int:
        """d, the numbers in one vector."""
        return sum(self.base.tensors[name].numel for name in self.names)

    def deltas(self, name: str) -> list[Delta]:
        """One change per vector for the weight ``name``, on the device; a tensor that a task lacks is unchanged."""
        return self.read(name)

    def stored(self, name: str) -> list[Tensor]:
        """What is mapped of the base and the full checkpoints when ``deltas(name)`` is computed."""
        return [tensor for model in self._read_for(name) for tensor in model.mapped(name)]

    def copied(self, name: str) -> int:
        """The bytes that ``deltas(name)`` takes beside the mapped files, where weights are quantised."""
        return sum(model.copied(name) for model in self._read_for(name))

    def _read_for(self, name: str) -> list[Checkpoint]:
        models = [model for model in self.models.values() if isinstance(model, Checkpoint) and name in model.tensors]
        return [self.base, *models] if models else []

    def mixed(self, weights: BasisWeights, over: str = "bases") -> Vectors:
        """Bases of these vectors, or the reconstructions from them, before any rounding.

        A method that has a mean vector (PCA) gives its bases without it: the mean is in the reconstructions only.
        """
        if over == "reconstructions":
            return replace(self, read=lambda name: mix(self.read(name), weights.reconstruction))
        check_over(over)
        labels = basis_labels(weights.num_bases)
        encoder = self.encoder @ weights.encoder
        return replace(self, labels=labels, encoder=encoder, read=lambda name: mix(self.read(name), weights.encoder))

    def data_weights(self) -> Tensor:
        """[T, K] float64, columns that sum to 1: how much the data of each task counts for each vector.

        Raises ParameterError for a vector without any positive share, as PCA has them: its data is not defined.
        """
        shares = self.encoder.clamp_min(0)
        empty = [label for label, total in zip(self.labels, shares.sum(0).tolist(), strict=True) if total <= 0]
        if empty:
            raise ParameterError(
                f"{len(empty)} of {len(self)} vectors hold no positive share of any task (first: {empty[0]}), so no "
                "data belongs to them; use ae bases, pca_positive, or merge over the reconstructions"
            )
        return shares / shares.sum(0)

    def selected(self, indices: Sequence[int]) -> Vectors:
        """Some of the vectors, in the order given."""
        kept = list(indices)
        return replace(
            self,
            labels=tuple(self.labels[i] for i in kept),
            encoder=self.encoder[:, kept],
            read=lambda name: [deltas[i] for deltas in [self.read(name)] for i in kept],
        )


def open_model(source: str | Path, base: Checkpoint, *, revision: str | None = None) -> Model:
    """A checkpoint or an adapter, whichever is there, or the adapter of ``base+adapter``.

    Raises MismatchError for an adapter on another base than this one.
    """
    below, plus, adapter = str(source).partition("+")
    if plus and not local_path(source):
        if below != base.label and (base.path is None or locate(below).resolve() != base.path.resolve()):
            raise MismatchError(
                f'"{source}": the adapter is on {below}, but the base is {base.label}; its change cannot be added there'
            )
        return Adapter.open(adapter, base, revision=revision, label=str(source))
    path = adapter_folder(locate(str(source), revision))
    if is_adapter(path):
        return Adapter.open(path, base, label=str(source))
    return Checkpoint.open(path, label=str(source))


def are_adapters(tasks: Mapping[str, str | Path]) -> bool:
    """Whether all of them are adapters, as far as the files tell; nothing is downloaded."""
    places = [local_path(source) for source in tasks.values()]
    return all(path is not None and is_adapter(adapter_folder(path)) for path in places)


def parse_tasks(items: Iterable[str], noun: str = "task", example: str = "math=path/to/math") -> dict[str, str]:
    """``NAME=PATH`` arguments as a dictionary; ParameterError, of the ``noun``, for a bad or repeated one."""
    tasks: dict[str, str] = {}
    for item in items:
        name, separator, source = item.partition("=")
        if not separator or not name.strip() or not source.strip():
            raise ParameterError(f'"{item}" is not NAME=PATH, for example {example}')
        if printable(name) != name:
            raise ParameterError(
                f'{noun} "{printable(name)}": its name has characters that cannot be seen; leave them out'
            )
        if name in tasks:
            raise ParameterError(f'two {noun}s are named "{name}" ({tasks[name]} and {source}); give each its own name')
        tasks[name] = source
    return tasks


def _with_new_biases(base: Checkpoint, models: Mapping[str, Model]) -> Checkpoint:
    """With the biases that adapters give to layers without one; refused beside checkpoints, which make checkpoints."""
    for model in models.values():
        if isinstance(model, Adapter):
            base = base.with_biases(model.new_biases)
    if any(isinstance(model, Checkpoint) for model in models.values()):
        base.check_storable()
    return base


def _given_twice(tasks: Mapping[str, str | Path]) -> dict[str, str]:
    """{task: the first task that was given the same path or Hub id}"""
    first: dict[str, str] = {}
    places = {task: str((local_path(source) or Path(source)).resolve()) for task, source in tasks.items()}
    return {task: first[place] for task, place in places.items() if first.setdefault(place, task) != task}


def basis_labels(count: int) -> tuple[str, ...]:
    """What M basis vectors are called."""
    return tuple(f"basis {index}" for index in range(count))


def check_over(over: str) -> None:
    if over not in OVER:
        raise ParameterError(f"over must be one of {', '.join(OVER)}; got {over!r}")


def _changes(base: Checkpoint, models: Mapping[str, Model], name: str, device: torch.device) -> list[Delta]:
    full = {task: m for task, m in models.items() if isinstance(m, Checkpoint) and name in m.tensors}
    whole = any(isinstance(model, Checkpoint) for model in models.values())
    # One tensor of the base for all models, on another device one copy of it.
    holders = [base, *full.values()] if whole else []
    read = finite_values(name, [m.label for m in holders], [m.read(name).to(device) for m in holders])
    own, values = (read[0] if whole else None), dict(zip(full, read[1:], strict=True))
    return [_change(base, model, name, values.get(task, own), own, device) for task, model in models.items()]


def _change(
    base: Checkpoint, model: Model, name: str, tuned: Tensor | None, own: Tensor | None, device: torch.device
) -> Delta:
    if isinstance(model, Checkpoint):
        assert tuned is not None
        return Dense(tuned, own)
    return (model.delta(name) or _no_change(base, name)).to(device)


def _no_change(base: Checkpoint, name: str) -> Delta:
    shape = base.tensors[name].shape
    return zeros(shape if len(shape) < 2 else (shape[0], math.prod(shape[1:])))
