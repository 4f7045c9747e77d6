"""What `tvbases inspect` leaves behind: a picture, and a page with the picture, the tables and the warnings."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from commands.command_line import inputs, root, tvbases
from oracles.merge_oracle import write_config
from tvbases_hf.cli.inspection import print_inspection
from tvbases_hf.cli.page import PageConsole, write_page
from tvbases_hf.version import library_version
from zoo.hf_models import Family

if TYPE_CHECKING:
    from commands.browser import Browser

pytest.importorskip("matplotlib")
pytest_plugins = ["zoo.hf_fixtures", "commands.browser"]
PNG = b"\x89PNG\r\n\x1a\n"
LONG = [f"finetune-of-llama-3-on-dataset-{i}-with-a-name-that-is-long" for i in range(12)]


def texts(page: str, tag: str) -> list[str]:
    """What stands in the elements of that name."""
    return [html.unescape(re.sub(r"<[^>]*>", "", inner)) for inner in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page)]


def test_the_page_holds_what_the_command_prints_and_the_picture(pair: Family) -> None:
    place = root(pair)
    files = {option: place / name for option, name in (("--html", "a.html"), ("--plot", "a.png"), ("--json", "a.json"))}
    arguments = [*inputs(pair), *(part for item in files.items() for part in item)]
    shown = tvbases("inspect", *arguments)
    assert shown.code == 0
    text = files["--html"].read_text(encoding="utf-8")
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert base64.b64decode(picture).startswith(PNG) and files["--plot"].read_bytes().startswith(PNG)
    for line in shown.out.splitlines():  # every number and word of the tables that the terminal shows
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            assert all(cell in texts(text, "td") + texts(text, "th") for cell in cells), line
    printed = PageConsole()
    print_inspection(json.loads(files["--json"].read_text()), printed)  # type: ignore[arg-type]
    assert printed.sections and all(section in text for section in printed.sections)
    assert "math" in text and "singular task interference" in text
    assert all(re.search(r"<h2>[^<]*</h2>\n<p>", section) for section in printed.sections if "<table" in section)
    assert f"tvbases-hf {library_version()}, 20" in text and "$ tvbases inspect --base " in html.unescape(text)
    assert "http" not in text.replace("http-equiv", ""), "no other file is needed"
    assert text.count("<script") == 1 and "<script>" in text and "default-src 'none'" in text


def test_names_and_warnings_are_text_on_the_page(pair: Family, tmp_path: Path) -> None:
    file = root(pair) / "a.json"
    assert tvbases("inspect", *inputs(pair), "--layers", "--quiet", "--json", file).code == 0
    found = json.loads(file.read_text()) | {"base": "<b>base</b>", "warnings": ["<i>math</i> & code"]}
    write_page(
        found,
        [lambda console: console.print("<u>table</u>", markup=False, highlight=False)],
        PNG,
        tmp_path / "page.html",
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;base&lt;/b&gt;" in text and "warning: &lt;i&gt;math&lt;/i&gt; &amp; code" in text
    assert "&lt;u&gt;table&lt;/u&gt;" in text and not re.findall("<[biu]>", text)


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_a_file_in_no_directory_is_refused_before_any_work(option: str, pair: Family) -> None:
    done = tvbases("inspect", "--base", "nowhere", "--task", "a=b", option, root(pair) / "absent" / "file")
    assert done.code == 2 and f"{option} " in done.err and "not a file in a directory that exists" in done.err


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_a_picture_without_matplotlib_is_refused_before_any_work(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvbases_hf.cli import options

    monkeypatch.setattr(options, "find_spec", lambda name: None)
    done = tvbases("inspect", "--base", "nowhere", "--task", "a=b", option, "file")
    assert done.code == 2 and f'{option} needs matplotlib; pip install "tvbases-hf[plot]"' in done.err


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inspection of twelve tasks with long names, with layers and warnings."""
    count = range(12)
    cosine = [[1.0 if i == j else 0.01 * (i + j) - 0.1 for j in count] for i in count]
    pairs = [f"{LONG[i]} / {LONG[j]}" for i in count for j in count if i < j]
    groups = {f"layers.{i}": {"leading": 0.1 * i, "whole": 0.2 * i} for i in count}
    layers: dict[str, Any] = {"singular": {"groups": groups}}
    layers |= {"shared": dict.fromkeys(pairs, 0.2), "chance": dict.fromkeys(pairs, 0.1)}
    falling = [0.9 - m / 20 for m in count]
    found = {"tasks": LONG, "parameters": 8_030_261_248, "tensors": 291, "base": "meta-llama/" + "x" * 120}
    found |= {"norm": [1234.5 + i for i in count], "norm_ratio": None, "cosine": cosine, "layers": layers}
    found |= {"unexplained": {"any_vectors": falling, "balanced_bases": falling}, "suggested_num_bases": 12}
    found |= {"warnings": ["a path /tmp/" + "directory" * 20 + " and a warning of some length, as they come"]}
    file = tmp_path_factory.mktemp("page") / "page.html"
    shows = [lambda console: print_inspection(found, console)]
    write_page(found, shows, b"", file, command="tvbases inspect --base llama/ " + "--task name=path " * 30)
    return file


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_on_a_phone_and_a_desk_by_day_and_night(
    width: int, scheme: str, long_page: Path, browser: Browser
) -> None:
    browser.look(width, scheme)
    browser.open(long_page.as_uri())
    seen = browser.seen()
    assert seen["out"] == [] and seen["wide"] <= 0, "nothing sticks out"
    assert seen["contrast"] >= 4.5, seen["where"]
    assert (sum(seen["ground"]) > 400) == (scheme == "light")
    assert browser.problems() == []


@pytest.fixture(scope="module")
def pages(llama: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the other commands write with --html."""
    place = tmp_path_factory.mktemp("pages")
    (place / "prose.txt").write_text("word1 word2 word3\n" * 20, encoding="utf-8")
    (place / "other.txt").write_text("word7 word8 word9\n" * 20, encoding="utf-8")
    models = [{"model": str(path), "parameters": {"weight": -0.5}} for path in llama.tuned()]
    config = {"merge_method": "task_arithmetic", "base_model": str(llama.base), "models": models, "dtype": "float32"}
    write_config(place / "merge.yml", config)
    text, other = (f"text:{place / name}" for name in ("prose.txt", "other.txt"))
    tasks = [f"--task={name}={path}" for name, path in llama.tasks.items()]
    measured = ["--alphas", "0.1,0.2", "--device", "cpu"]
    given: dict[str, list[Any]] = {
        "merge": [place / "merge.yml", place / "merged"],
        "tune": [place / "merge.yml", place / "tuned", "--target", text, *measured],
        "negate": ["--base", llama.base, *tasks, "--forget", "math", "--control", other, "--curve", *measured],
    }
    given["negate"] += ["--target", text, "--keep", 0.1, "--out", place / "clean"]
    for name, arguments in given.items():
        done = tvbases(name, *arguments, "--html", place / f"{name}.html")
        assert done.code == 0, done.err
    return {name: place / f"{name}.html" for name in given}


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("command", ["merge", "negate", "tune"])
def test_the_pages_of_the_other_commands_can_be_read_so_too(
    command: str, width: int, scheme: str, pages: dict[str, Path], browser: Browser
) -> None:
    browser.look(width, scheme)
    browser.open(pages[command].as_uri())
    seen = browser.seen()
    assert seen["out"] == [] and seen["wide"] <= 0, "nothing sticks out"
    assert seen["contrast"] >= 4.5, seen["where"]
    assert browser.run("return document.title.length > 0 && document.querySelector('p.made') !== null")
    assert browser.problems() == []


def test_a_click_sorts_a_table_by_value_and_another_turns_it_round(long_page: Path, browser: Browser) -> None:
    browser.open(long_page.as_uri())
    click = "document.querySelectorAll('table')[0].querySelectorAll('button')[1].click(); return 1"
    norms = "return [...document.querySelectorAll('table')[0].tBodies[0].rows].map((row) => row.cells[1].textContent)"
    before = browser.run(norms)
    browser.run(click)
    assert browser.run(norms) == sorted(before, key=float)
    browser.run(click)
    assert browser.run(norms) == sorted(before, key=float, reverse=True) != before
