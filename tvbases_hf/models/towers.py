"""Fine-tunes of one tower of the base, such as CLIP's encoder of images alone, by the names that the base has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MismatchError
from ..storage.checkpoint import Checkpoint
from .names import Naming


def is_tower(config: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a part of a model of several, as its own configuration names them."""
    kinds = {part.get("model_type") for name, part in of.items() if name.endswith("_config") and isinstance(part, dict)}
    kind, whole = config.get("model_type"), of.get("model_type")
    return bool(kind and whole) and kind != whole and (kind in kinds or str(kind).startswith(f"{whole}_"))


def placed(model: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A tower's tensors by the names that they have in the base; any other model as it is.

    Raises MismatchError for a tower whose tensors the base does not have.
    """
    if not is_tower(model.config, base.config):
        return model
    names = [name for name, info in model.tensors.items() if info.dtype.is_floating_point]
    try:
        naming = Naming.resolve(names, base) if names else Naming()
    except MismatchError as error:
        raise MismatchError(f'"{model.label}", a {model.config["model_type"]}, {error}') from error
    return model.renamed(lambda name: naming.to_base(name) or name)
