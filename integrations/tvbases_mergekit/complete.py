"""Whether mergekit will write all of a model, or leave out what it does not know of its architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from mergekit.architecture import WeightInfo
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PermuteForRope

from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.translation import absent_from
from tvbases_hf.storage.checkpoint import Checkpoint


def check_complete(base: Checkpoint, planned: Iterable[WeightInfo]) -> None:
    """CheckpointError where a tensor of ``base`` is not written, which loading would fill with random numbers.

    A tied matrix is written with the one that it is tied to, and what the model's class does not have is not missed.
    """
    planned = list(planned)
    _check_converted(base, [weight.name for weight in planned])
    names = {name for weight in planned for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))}
    lost = [name for name, info in base.tensors.items() if name not in names and info.numel]
    model = _skeleton(base.config) if lost else None
    if model is not None:
        lost = absent_from(model, lost, names)
    else:
        lost = [name for name in lost if base.tensors[name].dtype.is_floating_point]
    if lost:
        raise CheckpointError(
            f'"{base.label}": mergekit would leave out {len(lost)} of {len(base.tensors)} tensors (first: {lost[0]}), '
            "and loading would put random numbers there; `tvbases merge` takes the same YAML and merges all of them"
        )


def _check_converted(base: Checkpoint, planned: Iterable[str]) -> None:
    """CheckpointError for weights that mergekit converts without the configuration that tells how.

    transformers interleaves the rows of rotary matrices head by head; mergekit asks for it as if there were one head.
    """
    mapping: list[Any] = get_checkpoint_conversion_mapping(base.config.get("model_type")) or []
    permuted = [entry for entry in mapping if any(isinstance(op, PermuteForRope) for op in _operations(entry))]
    targets = [target for entry in permuted for target in entry.target_patterns]
    lost = [name for name in planned if name not in base.tensors and any(target in name for target in targets)]
    if lost:
        raise CheckpointError(
            f'"{base.label}": mergekit would mix up the rows of {len(lost)} rotary matrices (first: {lost[0]}), which '
            "it splits without knowing the heads; `tvbases merge` takes the same YAML and merges them as they are"
        )


def _operations(entry: Any) -> Iterable[Any]:
    """Of a conversion; those that only rename have none."""
    return getattr(entry, "operations", None) or ()


def _skeleton(config: dict[str, Any]) -> torch.nn.Module | None:
    """The model without numbers; None where the class is not in transformers or cannot be made."""
    try:
        kind = getattr(transformers, config["architectures"][0])
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(dict(config)))
        model.tie_weights()
        return model
    except Exception:  # whatever the class says to a configuration that it does not know
        return None
