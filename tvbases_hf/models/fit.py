"""Whether models fit one base: the same architecture, names, shapes and number format; and what they leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import MismatchError, ParameterError
from ..storage.checkpoint import Checkpoint
from ..storage.tensors import TensorInfo
from ..storage.tied import embedding_of, is_output
from .adapter import Adapter
from .identity import model_name, other_base
from .towers import is_tower
from .vocabulary import differing_rows, shapes_of


@dataclass(frozen=True)
class Coverage:
    """The tensors that carry task vectors, and what they leave out: tensors that a fine-tune lacks, that the base
    lacks, or of another shape. ``heads`` are those of adapters that the base lacks; see Adapter.head_names.
    ``integers`` finds (it reads them) tensors of whole numbers that differ from the base's; ``formats`` is what the
    weights of a model are quantised as where the base's are not, or the other way round. ``twice`` is {task: the task
    that was given the same model}. ``adapters`` finds (it reads them) what to say of adapters that change nothing, or
    were trained on another base.
    """

    names: tuple[str, ...] = ()
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    heads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    integers: Callable[[], dict[str, tuple[str, ...]]] = dict
    formats: dict[str, str] = field(default_factory=dict)
    twice: dict[str, str] = field(default_factory=dict)
    adapters: Callable[[], list[str]] = list
    rows: str = ""
    """What became of rows that not all vocabularies have."""

    def notes(self) -> list[str]:
        """One line per finding, for the user."""
        lines = [given_twice(task, first) for task, first in self.twice.items()] + self.adapters()
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
        for task, names in self.integers().items():
            lines.append(
                f'"{task}": {len(names)} tensors of integers differ from the base\'s (first: {names[0]}); they stay as '
                "the base has them, since integers carry no task vector"
            )
        for task, formats in self.formats.items():
            lines.append(f'"{task}": {formats}; its change holds the error of that rounding as well')
        if self.rows:
            lines.append(self.rows)
        if self.skipped:
            lines.append(f"{len(self.skipped)} tensors differ in shape (first: {self.skipped[0]}); left out")
        return lines


def given_twice(task: str, first: str) -> str:
    """What to say of a model under two names."""
    return f'"{task}" is the same model as "{first}", so it counts twice; leave one of them out'


def changes_nothing(task: str) -> str:
    """What to say of a model whose task vector is zero."""
    return f'"{task}" equals the base: its task vector is zero, like that of an adapter before its training'


def check_fit(base: Checkpoint, models: Mapping[str, Checkpoint | Adapter], skip_mismatched: bool = False) -> Coverage:
    """The tensors that carry task vectors of the models; see Vectors.of_models for arguments and what is raised."""
    if not models:
        raise ParameterError("no task given; name at least one, for example --task math=path/to/math")
    checkpoints = {task: model for task, model in models.items() if isinstance(model, Checkpoint)}
    adapters = {task: model for task, model in models.items() if isinstance(model, Adapter)}
    floating = [name for name, info in base.tensors.items() if info.dtype.is_floating_point]
    for task, model in checkpoints.items():
        _check_architecture(task, model, base, floating)
        _check_dtypes(task, model, floating)
    _check_same_base(adapters)
    mismatched = {task: _mismatched(model, base, floating) for task, model in models.items()}
    for task, names in mismatched.items():
        if names and (not skip_mismatched or task in adapters):
            raise _shape_error(task, names, models[task], base, len(floating))
    skipped = {name for names in mismatched.values() for name in names}
    changed = None if checkpoints else {name for adapter in adapters.values() for name in adapter.names}
    names = tuple(n for n in floating if n not in skipped and (changed is None or n in changed))
    return _coverage(checkpoints, adapters, base, names, tuple(sorted(skipped)))


def same_outputs(
    base: Checkpoint, models: Mapping[str, Checkpoint | Adapter]
) -> tuple[Checkpoint, dict[str, Checkpoint | Adapter]]:
    """All with the output matrix that one of them has of its own: where it is tied, it is the embedding."""
    checkpoints = [base, *(model for model in models.values() if isinstance(model, Checkpoint))]
    wanted = {name: info for model in checkpoints for name, info in _outputs(model, base)}
    level = {task: m.with_outputs(wanted) if isinstance(m, Checkpoint) else m for task, m in models.items()}
    return base.with_outputs(wanted), level


def _outputs(model: Checkpoint, base: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """The output matrices of the vocabulary: as large as the model's embedding, or as the base's."""
    embeddings = [{name: info.shape for name, info in m.tensors.items()} for m in (model, base)]
    for name, info in model.tensors.items():
        if is_output(name) and any(embedding_of(info.shape, shapes) for shapes in embeddings):
            yield name, info


def _quoted(task: str, model: Checkpoint | Adapter) -> str:
    return f'"{task}"' if task == model.label else f'"{task}" ({model.label})'


def _check_architecture(task: str, model: Checkpoint, base: Checkpoint, names: Sequence[str]) -> None:
    if is_tower(model.config, base.config):
        return
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


def _mismatched(model: Checkpoint | Adapter, base: Checkpoint, names: Sequence[str]) -> list[str]:
    shapes = shapes_of(model)
    return [name for name in names if name in shapes and shapes[name] != base.tensors[name].shape]


def _shape_error(
    task: str, names: list[str], model: Checkpoint | Adapter, base: Checkpoint, total: int
) -> MismatchError:
    ours, theirs = shapes_of(base), shapes_of(model)
    rows, first = differing_rows(ours, theirs), names[0]
    advice = (
        f"the vocabularies differ ({theirs[first][rows[first]]} and {ours[first][rows[first]]} tokens): --extra-rows "
        "drop takes the common rows, keep leaves a row that one model has as it is; in a mergekit YAML "
        "`tokenizer_source: union` (or base) matches tokens by name"
        if first in rows
        else "use a fine-tune of this base"
    )
    return MismatchError(
        f"{_quoted(task, model)}: {len(names)} of {total} tensors differ in shape from the base "
        f"(first: {first} {list(theirs[first])} vs {list(ours[first])}); {advice}"
    )


def _check_same_base(adapters: Mapping[str, Adapter]) -> None:
    """Adapters name the base they were trained on: it must be one model, wherever and in whatever format it is kept."""
    named = {task: adapter.base_id for task, adapter in adapters.items() if adapter.base_id}
    if len({model_name(base) for base in named.values()}) > 1:
        found = ", ".join(f'"{task}" on {base}' for task, base in named.items())
        raise MismatchError(
            f"the adapters were trained on different bases: {found}; their changes cannot be added. If it is one model "
            "under several names, set base_model_name_or_path in adapter_config.json to the same name"
        )


def _adapter_notes(adapters: Mapping[str, Adapter], base: Checkpoint) -> list[str]:
    lines = [changes_nothing(task) for task, adapter in adapters.items() if adapter.changes_nothing]
    reasons = {task: other_base(adapter.base_id, base) for task, adapter in adapters.items() if adapter.base_id}
    lines += [
        f'"{task}" was trained on {adapters[task].base_id}, and {reason}; its change means little there'
        for task, reason in reasons.items()
        if reason
    ]
    return lines


def _coverage(
    checkpoints: Mapping[str, Checkpoint],
    adapters: Mapping[str, Adapter],
    base: Checkpoint,
    names: tuple[str, ...],
    skipped: tuple[str, ...],
) -> Coverage:
    missing = {task: tuple(n for n in names if n not in model.tensors) for task, model in checkpoints.items()}
    if not checkpoints:  # beside checkpoints, an adapter naturally changes few of the tensors
        missing = {task: tuple(n for n in names if n not in model.names) for task, model in adapters.items()}
    extra = {task: tuple(n for n in model.tensors if n not in base.tensors) for task, model in checkpoints.items()}
    return Coverage(
        names=names,
        missing={task: found for task, found in missing.items() if found},
        extra={task: found for task, found in extra.items() if found},
        skipped=skipped,
        heads={task: adapter.head_names for task, adapter in adapters.items() if adapter.head_names},
        integers=lambda: {t: found for t, model in checkpoints.items() if (found := _other_integers(model, base))},
        adapters=lambda: _adapter_notes(adapters, base),
        formats={task: found for task, model in checkpoints.items() if (found := _other_format(model, base))},
    )


def _other_integers(model: Checkpoint, base: Checkpoint) -> tuple[str, ...]:
    """The tensors of whole numbers, such as positions and counts, that the model has otherwise than the base."""
    whole = [n for n, info in base.tensors.items() if not info.dtype.is_floating_point and n in model.tensors]
    return tuple(n for n in whole if not torch.equal(model.read(n), base.read(n)))


def _other_format(model: Checkpoint, base: Checkpoint) -> str:
    ours, theirs = (", ".join(sorted({w.format for w in m.quantised.values()})) for m in (base, model))
    if bool(ours) == bool(theirs):
        return ""
    return f"quantised ({theirs}) and the base is not" if theirs else f"not quantised and the base is ({ours})"
