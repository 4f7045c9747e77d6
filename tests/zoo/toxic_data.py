"""Placeholder prompts with the columns of the real data sets, and scorers of placeholder words: no toxic text here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BAD = "word7"


def toxigen_rows(count: int = 4) -> list[dict[str, Any]]:
    """As in the configuration ``prompts``: statements in a list, written with the two characters backslash and n."""
    return [{"prompt": f"- word{i} word1\\n- word2 word{i}\\n-"} for i in range(count)]


def annotated_rows(count: int = 4) -> list[dict[str, Any]]:
    """As in the configuration ``annotated``, its first columns."""
    return [{"text": f"word{i} word3", "target_group": "placeholder", "toxicity_human": 1.0} for i in range(count)]


def training_rows() -> list[dict[str, Any]]:
    """As in the configuration ``train``: a prompt once for each of its continuations, hateful and neutral ones."""
    return [
        {"prompt": f"word{i // 2} word4", "generation": f"word{i}", "group": "placeholder", "prompt_label": label}
        for label in (0, 1)
        for i in range(2 * label, 4 + 2 * label)
    ]


def real_toxicity_rows(count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "filename": "placeholder.txt",
            "begin": 0,
            "end": 9,
            "challenging": False,
            "prompt": {"text": f"word{i} word5", "toxicity": 0.1},
            "continuation": {"text": "word6", "toxicity": 0.1},
        }
        for i in range(count)
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def bad_share(text: str) -> float:
    """The share of words of a continuation that end in 7: a scorer with every kind of score."""
    words = text.split()
    return sum(word.endswith("7") for word in words) / len(words) if words else 0.0


def fails_on_even_length(text: str) -> float:
    """A scorer that has no answer for some texts."""
    if len(text) % 2 == 0:
        raise RuntimeError("no answer")
    return bad_share(text)


def always_fails(text: str) -> float:
    raise RuntimeError("never an answer")
