"""config.json: what is read of it is checked when it is read, and so are numbers that its readers count to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import CheckpointError
from .json_files import read_object, wrong_values

CONFIG = "config.json"
# transformers makes a list of as many entries, or as many modules, as such a key says.
COUNT = re.compile(r"(?:^|_)(?P<what>layers?|depths?|blocks|stages|experts|heads|labels)$")
# Layers from which on something is otherwise: Qwen2 has 28 here whatever its number of layers.
THRESHOLDS = ("max_window_layers",)
MODULES = ("layer", "layers", "depth", "depths", "blocks", "stages")
MOST = 10_000
MOST_LABELS = 1_000_000


class Known(BaseModel):
    """What this package reads of a configuration; all else is the model's own affair."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model_type: str | None = None
    architectures: list[str] | None = None
    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None


def read_model_config(directory: Path, label: str) -> dict[str, Any]:
    """The configuration of a model; empty where there is none.

    Raises CheckpointError for a file that is no JSON object, and as ``check_model_config`` does.
    """
    file = directory / CONFIG
    if not file.is_file():
        return {}
    config = read_object(file, label)
    check_model_config(config, label)
    return config


def check_model_config(config: Mapping[str, Any], label: str) -> None:
    """CheckpointError for values of another kind, and for more layers, heads or labels than any model has."""
    try:
        Known.model_validate(config)
    except ValidationError as error:
        raise CheckpointError(f'"{label}": {CONFIG} is damaged: {wrong_values(error)}; copy it again') from error
    for key, number, most in _counts(config):
        if not math.isfinite(number) or abs(number) > most:
            raise CheckpointError(
                f'"{label}": {CONFIG} says {key}: {number:g}, where {most} is the most that is read; copy it again'
            )


def most_layers(config: Mapping[str, Any]) -> float:
    """The largest number of layers, or of whatever else modules are made for one by one, that a configuration names."""
    made = (
        number
        for key, number, _ in _counts(config)
        if key not in THRESHOLDS and COUNT.search(key)["what"] in MODULES  # type: ignore[index]
    )
    return max(made, default=0)


def _counts(part: Any) -> Iterator[tuple[str, float, int]]:
    """Every number under a key that counts something, at any depth, with the most that it may be."""
    if isinstance(part, list):
        for inner in part:
            yield from _counts(inner)
    if not isinstance(part, Mapping):
        return
    for key, value in part.items():
        yield from _counts(value)
        if found := COUNT.search(key):
            numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, (int, float))]
            yield from ((key, number, MOST_LABELS if found["what"] == "labels" else MOST) for number in numbers)
