"""The model in memory that a checkpoint's configuration describes, without its numbers: for names and shapes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..storage.checkpoint import Checkpoint
from ..storage.model_config import most_layers
from .names import count_named
from .translation import stored_in


def skeleton(base: Checkpoint) -> nn.Module | None:
    """transformers' model of the base's configuration on the meta device; do not change it.

    None where the configuration names no class that the installed transformers has, or transformers is not there; and
    where it asks for more layers than the checkpoint has tensors.
    """
    if most_layers(base.config) > len(base.tensors):
        return None
    return _skeleton(json.dumps(base.config, sort_keys=True, default=str))


def names_in_memory(base: Checkpoint) -> dict[str, str]:
    """{the base's name: the model's name} of the tensors that transformers keeps whole under another name in memory."""
    model = skeleton(base)
    if model is None:
        return {}
    found = stored_in(model, base.tensors)
    return {
        name: stored.parts[0].parameter
        for name, stored in found.items()
        if stored.is_whole and stored.shape == base.tensors[name].shape and stored.parts[0].parameter != name
    }


def names_meant(names: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """``names_in_memory`` where more of an adapter's names are those than are the files'; else nothing."""
    own = [name.replace(".base_layer.", ".") for name in names]
    in_files = count_named(own, base.tensors)
    if in_files == len(own):
        return {}
    memory = names_in_memory(base)
    return memory if count_named(own, [memory.get(name, name) for name in base.tensors]) > in_files else {}


def check_not_in_parts(label: str, names: Iterable[str], base: Checkpoint) -> None:
    """CheckpointError for a saved tensor that the base stores as several, such as all experts: it is no head."""
    model = skeleton(base) if (listed := list(names)) else None
    found = {} if model is None else stored_in(model, base.tensors)
    parts = {part.parameter for stored in found.values() if not stored.is_whole for part in stored.parts}
    split = [name for name in listed if count_named([name], parts)]
    if split:
        raise CheckpointError(
            f'"{label}": saves {len(split)} tensors whole that the base ({base.label}) stores in parts (first: '
            f"{split[0]}); merge it with PEFT (merge_and_unload) and give the full checkpoint, or train them as "
            "target_parameters"
        )


def model_class(base: Checkpoint) -> Any:
    """transformers' class of model that the base's configuration names; None where there is no such class."""
    return _class(base.config)


def _class(config: Mapping[str, Any]) -> Any:
    architectures = config.get("architectures") or [None]
    try:
        import transformers

        return getattr(transformers, str(architectures[0]), None)
    except Exception:  # importing a class may fail for whatever it needs
        return None


@lru_cache(maxsize=4)
def _skeleton(config: str) -> nn.Module | None:
    words: dict[str, Any] = json.loads(config)
    kind = _class(words)
    try:
        with torch.device("meta"):
            return kind(kind.config_class.from_dict(words))
    except Exception:  # whatever another library has against a configuration, its names are not known then
        return None
