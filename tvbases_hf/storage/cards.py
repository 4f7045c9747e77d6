"""Model cards (README.md): they list the files beside them, and one that somebody has changed is theirs, and stays."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from ..text import code_span, in_yaml
from .files import HUB_ID, local_path, without_revision

CARD = "README.md"
# The last line; Markdown does not show it.
SEAL = "<!-- tvbases {} -->\n"
SEALED = re.compile("(.*)" + re.escape(SEAL).replace(r"\{\}", "([0-9a-f]{16})"), re.DOTALL)


def header(library: str, base: str, relation: str, tags: Sequence[str], merged: Sequence[str] = ()) -> list[str]:
    """The lines of a card's header, as the Hub reads them.

    ``base`` and the ``merged`` models are named where they are ids of the Hub, without a revision; ``relation`` is what
    the Hub's tree of models calls it: adapter, merge or finetune. The licence is that of the parts: the text says so.
    """
    found = [hub_id(model) for model in dict.fromkeys([base, *merged])]
    models = [model for model in dict.fromkeys(found) if model]
    lines = [f"library_name: {library}", f"tags: [{', '.join(tags)}]"]
    if len(models) == 1:
        lines.append(f"base_model: {in_yaml(models[0])}")
    elif models:
        lines += ["base_model:", *(f"- {in_yaml(model)}" for model in models)]
    return ["---", *lines, *([f"base_model_relation: {relation}"] if models else []), "---"]


def hub_id(source: str) -> str | None:
    """``owner/name`` of a model, or of the adapter of ``base+adapter``; None for a local one."""
    last = source.rpartition("+")[2]
    named, _ = without_revision(last)
    return named if HUB_ID.match(named) and not local_path(named) else None


def write_card(directory: Path, text: str) -> None:
    """Write a card, after all other files: it ends with a list of them."""
    names = sorted({CARD, *(file.name for file in directory.iterdir())})
    seal_card(directory, f"{text.rstrip()}\n\nFiles: {', '.join(map(code_span, names))}.")


def seal_card(directory: Path, text: str) -> None:
    """Write a card with a digest of itself in its last line."""
    text = f"{text.rstrip()}\n\n"
    (directory / CARD).write_text(text + SEAL.format(_digest(text)), encoding="utf-8", newline="\n")


def is_untouched(card: Path) -> bool:
    """Whether a card is as it was written."""
    try:
        found = SEALED.fullmatch(card.read_bytes().decode("utf-8"))
    except (OSError, ValueError):
        return False
    return found is not None and found[2] == _digest(found[1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
