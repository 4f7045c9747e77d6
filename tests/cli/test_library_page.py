"""The page of `tvbases library inspect --html`, in a browser at two widths, by day and night."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tvbases_hf.cli.library import _print_inspection, _print_tasks
from tvbases_hf.cli.page import write_page

if TYPE_CHECKING:
    from commands.browser import Browser

pytest_plugins = ["commands.browser"]
LONG = [f"adapter-of-llama-3-on-dataset-{i}-with-a-name-that-is-long" for i in range(9)]
ERRORS = [0.01 * (9 - i) for i in range(9)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `inspect` tells of nine adapters with long names, two of them near copies."""
    found: dict[str, Any] = {"out": "skills/" + "x" * 90, "tasks": LONG, "task_error": ERRORS, "clusters": 2}
    found |= {"task_cluster": [i % 3 - 1 for i in range(9)], "task_bytes": [10_000 * (i + 1) for i in range(9)]}
    found |= {"cluster_members": [LONG[1::3], LONG[2::3]], "bytes": 450_000, "bytes_of_task_vectors": 3_000_000}
    found |= {"shared_directions": [{"outputs": 24.0, "inputs": 20.5, "bits": 8.0}] * 2, "share": 0.15}
    found |= {"near_copies": [{"tasks": LONG[:2], "cosine": 0.991}], "mean_square_error": 0.0025}
    return found | {"curve": [{"bytes": 1e5 * 2**i, "error": 0.4 / 2**i} for i in range(5)]}


@pytest.fixture(scope="module")
def page(found: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    shows = [functools.partial(show, found) for show in (_print_inspection, _print_tasks)]
    write_page(found, shows, b"", file, title="9 adapters in skills/", command="tvbases library inspect " + "x" * 200)
    return file


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_on_a_phone_and_a_desk_by_day_and_night(
    width: int, scheme: str, page: Path, browser: Browser
) -> None:
    browser.look(width, scheme)
    browser.open(page.as_uri())
    seen = browser.seen()
    assert seen["out"] == [] and seen["wide"] <= 0, "nothing sticks out"
    assert seen["contrast"] >= 4.5, seen["where"]
    assert browser.problems() == []


def test_the_page_has_every_task_and_the_chosen_point_among_those_that_were_planned(
    page: Path, found: dict[str, Any], browser: Browser
) -> None:
    browser.open(page.as_uri())
    read = "return [...document.querySelectorAll('section')].map((s) => [s.querySelector('h2').textContent, " + (
        "[...s.querySelector('table').tBodies[0].rows].map((r) => [...r.cells].map((c) => c.textContent))])"
    )
    tables: dict[str, Any] = dict(browser.run(read))
    assert list(tables) == ["what clusters share", "near copies", "what a byte buys", "tasks"]
    assert [row[0] for row in tables["tasks"]] == LONG and tables["near copies"] == [[*LONG[:2], "0.991"]]
    assert tables["what a byte buys"][3] == ["stored", "450 kB", "15.0%", "5.00%"]
    sort = "const t = [...document.querySelectorAll('table')].pop(); t.querySelectorAll('button')[3].click();"
    errors = browser.run(sort + " return [...t.tBodies[0].rows].map((row) => row.cells[3].textContent)")
    assert errors == [f"{error:.1%}" for error in sorted(found["task_error"])]
