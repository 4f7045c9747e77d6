"""Named task vectors over one base: opened once, validated once, read one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapters.adapter import Adapter, is_adapter
from .delta import Delta, Dense, LowRank, moved
from .errors import MismatchError, ParameterError
from .storage.checkpoint import Checkpoint, locate

Model = Checkpoint | Adapter


@dataclass(frozen=True)
class Coverage:
    """What the task vectors leave out: tensors that a fine-tune lacks, that the base lacks, or of another shape.

    ``heads`` are those of adapters that the base lacks; see Adapter.head_names.
    """

    missing: dict[str, tuple[str, ...]]
    extra: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...]
    heads: dict[str, tuple[str, ...]]

    def notes(self) -> list[str]:
        """One line per finding, for the user."""
        lines = []
        for task, names in self.missing.items():
            lines.append(
                f'"{task}": {len(names)} tensors of the base are absent (first: {names[0]}); counted as unchanged'
            )
        for task, names in self.extra.items():
            lines.append(f'"{task}": {len(names)} tensors are not in the base (first: {names[0]}); left out')
        for task, names in self.heads.items():
            lines.append(
                f'"{task}": {len(names)} tensors are not in the base (first: {names[0]}); an adapter keeps them as '
                "they are, a checkpoint leaves them out"
            )
        if self.skipped:
            lines.append(f"{len(self.skipped)} tensors differ in shape (first: {self.skipped[0]}); left out")
        return lines


class TaskVectors:
    """T task vectors tau_i = theta_i - theta_0 over the tensors of one base, none of them in memory.

    ``names`` are the floating-point tensors of the base, in its order; integer buffers carry no task vector.
    ``device`` is where changes are, and so whatever is computed of them.
    """

    def __init__(
        self,
        base: Checkpoint,
        models: Mapping[str, Model],
        *,
        skip_mismatched: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        """Check that every model fits the base.

        Args:
            base: the pretrained model.
            models: fine-tuned models or adapters by task name, in the order of the Gram matrix.
            skip_mismatched: leave out tensors whose shapes differ instead of raising.
            device: where each weight's changes are moved to when they are read; see execution.device.find_device.

        Raises:
            ParameterError: no task.
            MismatchError: another architecture, tensors of other shapes, or quantised ones.
        """
        if not models:
            raise ParameterError("no task given; name at least one, for example --task math=path/to/math")
        self.base = base
        self.device = torch.device(device)
        self.models = dict(models)
        self.tasks = tuple(models)
        checkpoints = {task: model for task, model in self.models.items() if isinstance(model, Checkpoint)}
        adapters = {task: model for task, model in self.models.items() if isinstance(model, Adapter)}
        floating = [name for name, info in base.tensors.items() if info.dtype.is_floating_point]
        for task, model in checkpoints.items():
            _check_architecture(task, model, base, floating)
            _check_dtypes(task, model, floating)
        _check_same_base(adapters)
        mismatched = {task: _mismatched(model, base, floating) for task, model in checkpoints.items()}
        for task, names in mismatched.items():
            if names and not skip_mismatched:
                raise _shape_error(task, names, checkpoints[task], base, len(floating))
        skipped = {name for names in mismatched.values() for name in names}
        changed = None if checkpoints else {name for adapter in adapters.values() for name in adapter.names}
        self.names = tuple(n for n in floating if n not in skipped and (changed is None or n in changed))
        self.coverage = _coverage(checkpoints, adapters, base, self.names, tuple(sorted(skipped)))
        self.are_adapters = not checkpoints

    @classmethod
    def open(
        cls, base: str | Path, tasks: Mapping[str, str | Path], *, device: str | torch.device = "cpu"
    ) -> TaskVectors:
        """Open checkpoints or adapters by path or Hub id; see Checkpoint.open, Adapter.open and __init__."""
        opened = Checkpoint.open(base)
        return cls(opened, {task: open_model(source, opened) for task, source in tasks.items()}, device=device)

    def __len__(self) -> int:
        return len(self.tasks)

    def deltas(self, name: str) -> list[Delta]:
        """One delta per task for the tensor ``name``, on the device; a tensor that a task lacks is unchanged in it."""
        models = self.models.values()
        # One tensor for all models, on another device one copy of it.
        base = None if self.are_adapters else self.base.read(name).to(self.device)
        return [moved(self._delta(model, name, base), self.device) for model in models]

    def stored(self, name: str) -> list[Tensor]:
        """What is mapped of the base and the full checkpoints when ``deltas(name)`` is computed."""
        models = [model for model in self.models.values() if isinstance(model, Checkpoint) and name in model.tensors]
        return [model.read(name) for model in [self.base, *models]] if models else []

    def _delta(self, model: Model, name: str, base: Tensor | None) -> Delta:
        if isinstance(model, Checkpoint):
            assert base is not None
            return Dense(model.read(name) if name in model.tensors else base, base)
        return model.delta(name) or _no_change(self.base, name)

    @property
    def numel(self) -> int:
        """d, the numbers in one task vector."""
        return sum(self.base.tensors[name].numel for name in self.names)


def open_model(source: str | Path, base: Checkpoint, *, revision: str | None = None) -> Model:
    """A checkpoint or an adapter, whichever is there."""
    path = locate(str(source), revision)
    if is_adapter(path):
        return Adapter.open(path, base, label=str(source))
    return Checkpoint.open(path, label=str(source))


def _no_change(base: Checkpoint, name: str) -> Delta:
    shape = base.tensors[name].shape
    if len(shape) < 2:
        return Dense(torch.zeros(shape))
    return LowRank(torch.zeros(shape[0], 0), torch.zeros(0, math.prod(shape[1:])))


def parse_tasks(items: Iterable[str]) -> dict[str, str]:
    """``NAME=PATH`` arguments as a dictionary; ParameterError for a bad or repeated one."""
    tasks: dict[str, str] = {}
    for item in items:
        name, separator, source = item.partition("=")
        if not separator or not name.strip() or not source.strip():
            raise ParameterError(f'"{item}" is not NAME=PATH, for example math=path/to/math')
        if name in tasks:
            raise ParameterError(f'two tasks are named "{name}" ({tasks[name]} and {source}); give each its own name')
        tasks[name] = source
    return tasks


def _quoted(task: str, model: Checkpoint) -> str:
    return f'"{task}"' if task == model.label else f'"{task}" ({model.label})'


def _check_architecture(task: str, model: Checkpoint, base: Checkpoint, names: Sequence[str]) -> None:
    ours, theirs = base.config.get("model_type"), model.config.get("model_type")
    if ours and theirs and ours != theirs:
        raise MismatchError(
            f"{_quoted(task, model)} is a {theirs} model but the base ({base.label}) is {ours}; "
            "a task vector needs a fine-tune of this very base"
        )
    common = sum(name in model.tensors for name in names)
    if common * 2 < len(names) or common == 0:
        sample = next(iter(model.tensors))
        raise MismatchError(
            f"{_quoted(task, model)} has {common} of the {len(names)} tensors of the base ({base.label}); "
            f"it is another architecture (it has {sample}, "
            f"the base has {names[0] if names else 'no floating-point tensor'})"
        )


def _check_dtypes(task: str, model: Checkpoint, names: Sequence[str]) -> None:
    """Quantised weights mean something only with scales that are stored elsewhere: their differences mean nothing."""
    integers = [n for n in names if n in model.tensors and not model.tensors[n].dtype.is_floating_point]
    if integers:
        dtype = str(model.tensors[integers[0]].dtype).removeprefix("torch.")
        raise MismatchError(
            f"{_quoted(task, model)}: {len(integers)} of {len(names)} tensors are stored as integers "
            f"(first: {integers[0]}, {dtype}), so the model is quantised; give the fine-tune as it was before that"
        )


def _mismatched(model: Checkpoint, base: Checkpoint, names: Sequence[str]) -> list[str]:
    return [n for n in names if n in model.tensors and model.tensors[n].shape != base.tensors[n].shape]


def _shape_error(task: str, names: list[str], model: Checkpoint, base: Checkpoint, total: int) -> MismatchError:
    first = names[0]
    theirs, ours = list(model.tensors[first].shape), list(base.tensors[first].shape)
    vocabulary = (
        len(theirs) == 2 and theirs[1:] == ours[1:] and ("embed" in first or "lm_head" in first or "wte" in first)
    )
    advice = (
        f"the vocabularies differ ({theirs[0]} and {ours[0]} tokens): resize the fine-tune's to the base's with "
        f"model.resize_token_embeddings({ours[0]}) and save it; in a mergekit YAML, `tokenizer: {{source: base}}` "
        "aligns them"
        if vocabulary
        else "use a fine-tune of this base"
    )
    return MismatchError(
        f"{_quoted(task, model)}: {len(names)} of {total} tensors differ in shape from the base "
        f"(first: {first} {theirs} vs {ours}); {advice}"
    )


def _check_same_base(adapters: Mapping[str, Adapter]) -> None:
    """Adapters name the base they were trained on; the last part of the name must agree, wherever it is kept."""
    named = {task: adapter.base_id.rstrip("/").split("/")[-1] for task, adapter in adapters.items() if adapter.base_id}
    if len(set(named.values())) > 1:
        found = ", ".join(f'"{task}" on {adapters[task].base_id}' for task in named)
        raise MismatchError(
            f"the adapters were trained on different bases: {found}; their changes cannot be added. If it is one model "
            "under several names, set base_model_name_or_path in adapter_config.json to the same name"
        )


def _coverage(
    checkpoints: Mapping[str, Checkpoint],
    adapters: Mapping[str, Adapter],
    base: Checkpoint,
    names: Sequence[str],
    skipped: tuple[str, ...],
) -> Coverage:
    missing = {task: tuple(n for n in names if n not in model.tensors) for task, model in checkpoints.items()}
    if not checkpoints:  # beside checkpoints, an adapter naturally changes few of the tensors
        missing = {task: tuple(n for n in names if n not in model.names) for task, model in adapters.items()}
    extra = {task: tuple(n for n in model.tensors if n not in base.tensors) for task, model in checkpoints.items()}
    return Coverage(
        missing={task: found for task, found in missing.items() if found},
        extra={task: found for task, found in extra.items() if found},
        skipped=skipped,
        heads={task: adapter.head_names for task, adapter in adapters.items() if adapter.head_names},
    )
