"""Weights grouped by transformer block, for tables and plots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|transformer_blocks|single_transformer_blocks)\.(\d+)(?:\.|$)")
OTHER = "other"
Value = TypeVar("Value")


def group_of(name: str) -> str:
    """``block 3`` for weights of a numbered block, ``other`` for embeddings, heads and final norms."""
    found = BLOCK.search(name)
    return f"block {int(found.group(1))}" if found else OTHER


def in_order(groups: Mapping[str, Value]) -> dict[str, Value]:
    """Blocks by number, the others last."""
    return dict(sorted(groups.items(), key=lambda item: (item[0] == OTHER, len(item[0]), item[0])))
