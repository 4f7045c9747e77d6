"""Which token a row of the vocabulary stands for, as far as a tokenizer's own files say it without any library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_files import parse_json

Files = Mapping[str, Path | bytes]


def tokens_of(files: Files) -> dict[str, int]:
    """{token: its row}; empty where only a binary file knows, and where what is there is no tokenizer."""
    try:
        return _tokens(files)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError):
        return {}


def _tokens(files: Files) -> dict[str, int]:
    found: dict[str, int] = {}
    whole = read_json(files.get("tokenizer.json"))
    vocabulary = (whole.get("model") or {}).get("vocab") or read_json(files.get("vocab.json"))
    if isinstance(vocabulary, list):  # Unigram: [token, score], in order
        vocabulary = {str(entry[0]): row for row, entry in enumerate(vocabulary) if entry}
    if not vocabulary and "vocab.txt" in files:
        vocabulary = {token: row for row, token in enumerate(read(files["vocab.txt"]).decode().splitlines())}
    found |= {token: row for token, row in vocabulary.items() if isinstance(row, int)}
    found |= {t: row for t, row in read_json(files.get("added_tokens.json")).items() if isinstance(row, int)}
    added = read_json(files.get("tokenizer_config.json")).get("added_tokens_decoder") or {}
    entries = [*({"id": row, **_entry(token)} for row, token in added.items()), *(whole.get("added_tokens") or [])]
    return found | {str(entry["content"]): int(entry["id"]) for entry in entries if "content" in entry}


def _entry(token: Any) -> dict[str, Any]:
    return token if isinstance(token, dict) else {"content": token}


def read(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def read_json(content: Path | bytes | None) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none."""
    try:
        found = {} if content is None else parse_json(read(content))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
