"""Where a weight lies in its model, from its name: which stack of blocks (a tower), which block of how many.

A model of text and images, or an encoder with a decoder, has several towers, whose blocks have nothing in common but
their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

# The first module whose name says that it is a list of blocks; what is numbered further inside is part of a block.
LIST = r"(?:layers?|blocks?|stages?|layer_groups?)"
BLOCK = re.compile(rf"^(?P<tower>(?:.*?\.)??(?:h|\w*?{LIST}))\.(?P<index>\d+)(?:\.|$)")
LAST = re.compile(rf"(?:^|[._])(?:h|{LIST})$")
# What towers are called, by words in the names of their modules; the first that is there.
KINDS = {
    "vision": {"vision", "visual", "image"},
    "audio": {"audio", "speech"},
    "text": {"text", "language"},
    "encoder": {"encoder"},
    "decoder": {"decoder"},
}
OTHER = "other"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Position:
    """Block ``index`` of ``count`` in a tower; ``tower`` is the name of the modules that hold it."""

    tower: str
    index: int
    count: int

    @property
    def share(self) -> float:
        """0 for the first block, 1 for the last, and for an only one, as in mergekit."""
        return self.index / (self.count - 1) if self.count > 1 else 1.0


def positions_of(names: Iterable[str]) -> dict[str, Position]:
    """By name, for every weight of a numbered block. ``names`` have to be all of the model's."""
    found = {name: match for name in names if (match := BLOCK.match(name))}
    counts: dict[str, int] = {}
    for match in found.values():
        counts[match["tower"]] = max(counts.get(match["tower"], 0), int(match["index"]) + 1)
    return {name: Position(m["tower"], int(m["index"]), counts[m["tower"]]) for name, m in found.items()}


def groups_of(names: Iterable[str]) -> dict[str, str]:
    """``block 3`` for weights of a numbered block, ``vision block 3`` where there are several towers.

    ``other`` for embeddings, heads and final norms. ``names`` have to be all of the model's.
    """
    every = list(names)
    places = positions_of(every)
    called = tower_names({place.tower for place in places.values()})
    return {
        name: f"{called[place.tower]} block {place.index}".strip() if (place := places.get(name)) else OTHER
        for name in every
    }


def tower_names(towers: Iterable[str]) -> dict[str, str]:
    """What to call each tower: nothing for the only one, ``text`` or ``decoder`` where that tells it apart."""
    paths = sorted(towers)
    if len(paths) == 1:
        return {paths[0]: ""}
    kinds = {path: _kind(path) for path in paths}
    if any(kind in ("vision", "audio") for kind in kinds.values()):
        kinds = {path: kind or "text" for path, kind in kinds.items()}  # the trunk beside which a tower was put
    alone = {path for path in paths if kinds[path] and list(kinds.values()).count(kinds[path]) == 1}
    return {path: kinds[path] if path in alone else _own_words(path) for path in paths}


def in_order(groups: Mapping[str, Value]) -> dict[str, Value]:
    """Towers by name, their blocks by number, the others last."""
    return dict(sorted(groups.items(), key=lambda item: (item[0] == OTHER, *_numbered(item[0]))))


def _numbered(group: str) -> tuple[str, int]:
    tower, _, index = group.rpartition(" ")
    return (tower, int(index)) if index.isdigit() else (group, 0)


def _kind(path: str) -> str:
    words = set(re.split(r"[._]", path))
    return next((kind for kind, known in KINDS.items() if words & known), "")


def _own_words(path: str) -> str:
    """The path without the word for a list: ``vision_model.global_transformer.layers`` without ``layers``."""
    return LAST.sub("", path).replace(".", " ")
