"""The table of architectures: some of its rows, that it can fail, and that the page in the repository has no defect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compatibility import commands, table
from compatibility.commands import COLUMNS
from compatibility.small import find, mergekit_types, model_types
from compatibility.table import Cell, Row, defects, page, row
from torch import Tensor

PAGE = Path(__file__).parents[2] / "examples" / "compatibility" / "COMPATIBILITY.md"
# Conv1D; experts that mergekit packs, packed on disk, and transposed; names that differ in memory; two towers' blocks.
ROWS = ("gpt2", "gpt_oss", "granitemoe", "mixtral", "t5", "vit")
REFUSED = {"t5": ["mergekit-yaml"], "vit": ["mergekit-yaml"]}
QUICK = tuple(column for column in COLUMNS if column != "evaluate")


@pytest.mark.parametrize("name", ROWS)
def test_every_command_is_right_or_refuses(name: str) -> None:
    found = row(name, QUICK)
    assert found.cells is not None, found.unmade
    assert not defects([Row(name, cells={c: cell for c, cell in found.cells.items() if cell.verdict != "refused"})])
    assert [column for column, cell in found.cells.items() if cell.verdict == "refused"] == REFUSED.get(name, [])


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only where all is wrong: one weight of one command is."""
    exact = commands.exact

    def off(state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = exact(state)
        found["bert.pooler.dense.bias" if "bert.pooler.dense.bias" in found else next(iter(found))][0] += 1e-2
        return found

    def broken(place: commands.Place) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "exact", off)
    monkeypatch.setitem(COLUMNS, "plan", broken)
    found = row("bert", ("negate", "merge: tsv", "plan")).cells
    assert found is not None
    assert [cell.verdict for cell in found.values()] == ["wrong", "wrong", "crash"]
    assert len(defects([Row("bert", "BertModel", found)])) == 4  # and too few are right


def test_the_page_says_why_and_what_it_leaves_out() -> None:
    cells = {"merge": Cell("right"), "plan": Cell("refused", "no plan for it")}
    text = page([Row("bert", "BertModel", cells), Row("timm", unmade="needs timm")], ("merge", "plan"))
    assert "| bert | BertModel | ✓ | refused |" in text
    assert "1 model types, 2 cells: 1 right (50.0%), 1 refused, 0 wrong, 0 crashed." in text
    assert "* `plan` of bert. For example: no plan for it" in text and "could be made: timm" in text


def test_the_page_in_the_repository_has_no_defect_and_holds_all_that_mergekit_knows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    count = re.search(r"(\d+) model types, (\d+) cells: (\d+) right \(.*\), (\d+) refused, 0 wrong, 0 crashed", text)
    assert count is not None
    types, cells, right, refused = map(int, count.groups())
    assert types >= 60 and right >= table.LEAST_RIGHT * cells and right + refused == cells
    rows = set(re.findall(r"^\| ([\w-]+) \| \w+ \|", text, re.MULTILINE))
    assert len(rows) == types and set(model_types()) & mergekit_types() <= rows


def test_models_are_small_and_seeded() -> None:
    first, second = (find("llama").make(seed).state_dict() for seed in (0, 0))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert sum(tensor.numel() for tensor in first.values()) < 100_000
