"""Model cards (README.md): they list the files beside them, and one that somebody has changed is theirs, and stays."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..text import code_span

CARD = "README.md"
# The last line; Markdown does not show it.
SEAL = "<!-- tvbases {} -->\n"
SEALED = re.compile("(.*)" + re.escape(SEAL).replace(r"\{\}", "([0-9a-f]{16})"), re.DOTALL)


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
