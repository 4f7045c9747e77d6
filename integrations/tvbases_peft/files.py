"""Adapters in files that only PEFT itself can read: loaded on their base, and read there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.errors import CheckpointError, MismatchError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.names import Naming, is_shared
from tvbases_hf.models.skeleton import model_class, names_in_memory, skeleton
from tvbases_hf.models.translation import Stored, stored_in
from tvbases_hf.storage.checkpoint import Checkpoint

from .loaded import import_peft, task_vectors
from .merged import DenseAdapter

NAME = "default"


def open_adapter(path: Path, config: Mapping[str, Any], stored: Checkpoint, base: Checkpoint) -> Adapter:
    """An adapter of a method other than LoRA, of a base that transformers can load, which takes its memory.

    Raises:
        MissingExtraError: PEFT is not installed.
        CheckpointError: a method that is no change of weights, or a base or an adapter that cannot be loaded.
    """
    peft, kind = import_peft(), str(config.get("peft_type"))
    import transformers

    model_of = model_class(base)
    if model_of is None or base.path is None or base.quantised:
        raise CheckpointError(
            f'"{stored.label}": {kind} adapter, whose change only PEFT can compute, on the base as transformers loads '
            f"it, which is not possible for {base.label}, or not in full precision; merge it (merge_and_unload) and "
            "give the full checkpoint"
        )
    progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = model_of.from_pretrained(base.path, dtype="auto", local_files_only=True)
        loaded = peft.PeftModel.from_pretrained(model, str(path), adapter_name=NAME)
    except Exception as error:  # whatever transformers and PEFT have against it
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f'"{stored.label}": {kind} adapter, which PEFT cannot load: {reason}') from error
    finally:
        if progress:
            transformers.utils.logging.enable_progress_bar()
    try:
        inside = task_vectors(loaded, [NAME]).models[NAME]
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(f'"{NAME}"', f'"{stored.label}"', 1)) from error
    assert isinstance(inside, Adapter)
    naming = Naming(memory=names_in_memory(base))
    changes = _in_files(inside, base, stored.label)
    layouts = {n: own for n in changes if (own := inside.layout(naming.to_adapter(n))) is not None}
    return DenseAdapter(config, stored, base, changes, layouts, naming)


def _in_files(adapter: Adapter, base: Checkpoint, label: str) -> dict[str, Callable[[], Delta]]:
    """The changes of a model in memory, by the base's names."""
    model = skeleton(base)
    places = {} if model is None else stored_in(model, base.tensors)
    reached = {part.parameter for place in places.values() for part in place.parts}
    lost = [name for name in adapter.names if name not in reached]
    tied = [
        name
        for name, place in places.items()
        if place.parts[0].parameter in adapter.names and is_shared(name, base, adapter.config)
    ]
    if (lost or tied) and adapter.config.get("peft_type") != "TRAINABLE_TOKENS":
        raise MismatchError(
            f'"{label}": changes {(lost + tied)[0]}, which the base ({base.label}) does not store as a matrix of its '
            "own; untie it (tie_word_embeddings: false, saved with both matrices) or give the merged checkpoint"
        )
    return {
        name: _change(adapter, place)
        for name, place in places.items()
        if any(part.parameter in adapter.names for part in place.parts)
    }


def _change(adapter: Adapter, place: Stored) -> Callable[[], Delta]:
    def change() -> Delta:
        found = torch.zeros(place.shape, dtype=torch.float64)
        for part in place.parts:
            delta = adapter.delta(part.parameter)
            if delta is not None:
                part.put_outer(found, part.take_inner(dense(delta)))
        return Dense(found)

    return change
