"""Tables at any width: every number can be read, every name is told from the others, and no path is broken."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.cells import cell_len

from commands.command_line import compress, inputs, root, tvbases
from tvbases_hf.cli.app import console
from tvbases_hf.cli.inspection import print_inspection
from tvbases_hf.sheet import Sheet, shortened
from tvbases_hf.text import Terminal
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]
LONG = [f"finetune-of-llama-3-on-dataset-{i}-seed-{seed}" for i in range(6) for seed in (0, 1)]
WIDE = ["数学" * 20 + str(i) for i in range(5)]
NUMBER = re.compile(r"-?\d+\.\d+%?")


def shown(thing: object, width: int) -> list[str]:
    file = io.StringIO()
    Terminal(file=file, width=width).print(thing)
    return file.getvalue().splitlines()


def inspection(tasks: list[str]) -> dict[str, object]:
    """A report with a different number in every place."""
    count = len(tasks)
    tasks_of, falling = range(count), [0.9 - m / 20 for m in range(count)]
    cosine = [[1.0 if i == j else -0.99 + 0.01 * (i + j) + 0.1 * abs(i - j) for j in tasks_of] for i in tasks_of]
    losses = {"any_vectors": falling, "balanced_bases": [loss + 0.05 for loss in falling]}
    return {
        "tasks": tasks,
        "parameters": 8_030_261_248,
        "tensors": 291,
        "base": "meta-llama/Llama-3.1-8B",
        "norm": [1.234 + i for i in range(count)],
        "norm_ratio": [0.0123 + i / 1000 for i in range(count)],
        "cosine": cosine,
        "unexplained": losses,
        "suggested_num_bases": count,
    }


def test_an_inspection_of_twelve_tasks_with_long_names_can_be_read_at_80_columns() -> None:
    found = inspection(LONG)
    file = io.StringIO()
    print_inspection(found, Terminal(file=file, width=80))
    lines = file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    told = set(NUMBER.findall(file.getvalue()))
    pairs = sorted((found["cosine"][i][j] for i, j in itertools.combinations(range(12), 2)), reverse=True)  # type: ignore[index]
    expected = {f"{norm:.4g}" for norm in found["norm"]}  # type: ignore[attr-defined]
    expected |= {f"{ratio:.2%}" for ratio in found["norm_ratio"]}  # type: ignore[attr-defined]
    expected |= {f"{value:.2f}" for value in pairs[:10] + pairs[-10:]}
    assert expected <= told and "-0.…" not in file.getvalue()
    names = {line.split("│")[1].strip() for line in lines if line.startswith("│ fine")}
    assert len({name for name in names if "…" not in name}) == 12, "the lengths have room for whole names"
    assert "suggested: all 12 of them" in file.getvalue()


@pytest.mark.parametrize(
    ("count", "suggested", "words"),
    [
        (1, 1, ["1 task vector of", "suggested: 1 basis, which loses"]),
        (2, 2, ["2 task vectors of", "suggested: both of them."]),
        (3, 2, ["3 task vectors of", "suggested: 2 bases, which lose"]),
    ],
)
def test_an_inspection_counts_in_english(count: int, suggested: int, words: list[str]) -> None:
    file = io.StringIO()
    found = inspection([f"task{i}" for i in range(count)]) | {"suggested_num_bases": suggested}
    print_inspection(found, Terminal(file=file, width=200))
    assert all(word in file.getvalue() for word in words)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 400])
@pytest.mark.parametrize("names", [LONG, ["a", "b", "c"], WIDE], ids=["long", "short", "wide"])
def test_no_number_is_cut_and_no_two_names_look_alike(names: list[str], width: int) -> None:
    table = Sheet("task", *names, title="cosine")
    values = [[f"{(i * 31 + j * 17) % 199 / 100 - 1:.2f}" for j in range(len(names))] for i in range(len(names))]
    for name, row in zip(names, values, strict=True):
        table.add_row(name, *row)
    lines = shown(table, width)
    assert width < 40 or max(map(cell_len, lines)) <= width
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    by_name: dict[str, list[str]] = {}
    for name, *cells in rows:
        by_name.setdefault(name, []).extend(cells)
    assert list(by_name.values()) == values, "each row whole, under a name of its own"


@pytest.mark.parametrize("width", [8, 12, 20])
def test_short_names_are_unique_and_short(width: int) -> None:
    middle, longer = ["x" * 50 + c + "y" * 50 for c in "abc"], ["x" * n for n in range(20, 30)]
    for names in (LONG, WIDE, middle, longer, ["é" * 30, "short"]):
        short = shortened(names, width)
        assert len(set(short)) == len(names) and all(cell_len(name) <= width for name in short)
        assert all(new == old for new, old in zip(short, names, strict=True) if cell_len(old) <= width)


def test_names_that_fit_stay_as_they_are() -> None:
    assert shortened(["math", "code"], 10) == ["math", "code"]
    assert shortened(["a-long-name-1", "a-long-name-2"], 9) == ["a-lo…me-1", "a-lo…me-2"]


def test_lines_end_at_spaces_and_paths_stay_whole() -> None:
    path = "/tmp/" + "directory/" * 12 + "file"
    assert path in shown(f"it was written to {path} and can be read there", 40)
    file = io.StringIO()
    Terminal(file=file, width=40).print(f"{path} with a space/x: 3 vectors", soft_wrap=True)
    assert file.getvalue() == f"{path} with a space/x: 3 vectors\n"


def test_what_is_piped_is_not_wrapped(pair: Family) -> None:
    tasks = [part for name in LONG for part in ("--task", f"{name}={pair.tasks['math']}")]
    with patch.object(console, "_width", None):  # COLUMNS may have set one
        done = tvbases("inspect", "--base", pair.base, *tasks)
    assert done.code == 0, done.err
    head = next(line for line in done.out.splitlines() if LONG[0] in line and LONG[11] in line)
    assert all(name in head for name in LONG), "one matrix, with whole names"


def test_every_command_names_what_it_wrote(pair: Family) -> None:
    place = root(pair)
    report, page = place / "a report.json", place / "page.html"
    with patch.object(console, "_width", 40):
        done = tvbases("inspect", *inputs(pair), "--json", report, "--html", page)
    assert done.code == 0 and f"written: {report}, {page}" in done.out.splitlines()
    written = [("decompose", *inputs(pair), "--out"), compress(pair)[:-1]]
    for command in written:
        out = place / f"out of {command[0]}"
        assert f"{out}: " in tvbases(*command, out).out, command[0]
    assert tvbases("inspect", *inputs(pair), "--json", report, "--quiet").out == ""
    assert json.loads(report.read_text())["tasks"] == ["math", "code"]


def test_a_report_that_was_not_written_is_not_named(pair: Family, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert tvbases("inspect", *inputs(pair), "--json", report).out.count("written: ") == 1
    done = tvbases("inspect", "--base", tmp_path / "absent", "--task", "a=b", "--json", report)
    assert done.code == 2 and done.out == ""
