"""The notebook runs from a fresh kernel, cell by cell, and what it shows is so."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What every cell of code prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    said = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
            said.append(out.getvalue())
    return said


def test_every_single_task_is_still_there_and_the_merge_of_all_is_not_all_of_them(printed: list[str]) -> None:
    single = [int(share) for share in re.findall(r"(\d+)% of the next numbers", printed[4])]
    merged = [int(share) for share in re.findall(r"'(\d+)%'", printed[5])]
    assert len(single) == len(merged) == 3
    assert min(single) >= 80 > min(merged), "the tasks contradict each other"


def test_the_notebook_is_kept_without_outputs_and_in_the_format_of_jupyter() -> None:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    cells = found["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
