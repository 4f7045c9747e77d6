"""A run's journal that somebody has changed, or that was cut off, makes a run do its work again, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tvbases_hf.storage.journal import Entry, Journal, read_entries

GOOD = {"name": "a", "checksum": 1, "row": [0.5]}
BAD = (
    b'{"name": "b", "checksum": 1, "row": [NaN]}',
    b'{"name": "b", "checksum": 1, "row": "x"}',
    b'{"name": "b", "checksum": 1}',
    b'{"name": ["b"], "checksum": 1, "row": []}',
    b"[1]",
    b"[" * 50_000,
    b'{"name": "b", "checksum": 1, "row": [1',
    b"\xff",
)


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_line_that_is_no_entry_does_not_count(line: bytes, tmp_path: Path) -> None:
    journal = Journal(tmp_path, "key", 0)
    journal.add("a", 1, [0.5])
    with open(tmp_path / "journal-0.jsonl", "ab") as stream:
        stream.write(line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    assert read_entries(tmp_path, "key") == {"a": Entry(1, (0.5,))}


def test_a_journal_of_another_job_does_not_count(tmp_path: Path) -> None:
    Journal(tmp_path, "key", 0).add("a", 1, [0.5])
    assert read_entries(tmp_path, "other") == {}
