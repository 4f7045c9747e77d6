"""Merges that must be refused: a configuration, spoilt by an edit, and the message that it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands.command_line import refused, root
from oracles.merge_oracle import merge_config, write_config
from zoo.hf_models import Family

Config = dict[str, Any]
Edit = Callable[[Config], None]


def merge_refused(place: Family, edit: Edit | None = None, *options: str, **parameters: Any) -> str:
    """The message of a merge of these models with a configuration that ``edit`` has spoilt; no progress bars."""
    config = merge_config(place, **{"num_bases": 2, **parameters})
    if edit is not None:
        edit(config)
    file = write_config(root(place) / "merge.yml", config)
    return refused(root(place), "mergekit-yaml", file, root(place) / "out", "--quiet", *options)


def text_refused(directory: Path, text: str) -> str:
    file = directory / "merge.yml"
    file.write_text(text, encoding="utf-8")
    return refused(directory, "mergekit-yaml", file, directory / "out")


def set_weights(*weights: Any) -> Edit:
    def edit(config: Config) -> None:
        for model, weight in zip(config["models"], weights, strict=True):
            if weight is not None:
                model["parameters"] = {"weight": weight}

    return edit
