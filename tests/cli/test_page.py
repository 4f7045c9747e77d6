"""What `tvbases inspect` leaves behind: a picture, and a page with the picture, the tables and the warnings."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from commands.command_line import inputs, root, tvbases
from tvbases_hf.cli.page import write_page
from tvbases_hf.cli.tables import print_inspection
from zoo.hf_models import Family

pytest.importorskip("matplotlib")
pytest_plugins = ["zoo.hf_fixtures"]
PNG = b"\x89PNG\r\n\x1a\n"


def test_the_page_holds_what_the_command_prints_and_the_picture(pair: Family) -> None:
    place = root(pair)
    files = {option: place / name for option, name in (("--html", "a.html"), ("--plot", "a.png"), ("--json", "a.json"))}
    shown = tvbases("inspect", *inputs(pair), *(part for item in files.items() for part in item))
    assert shown.code == 0
    text = files["--html"].read_text(encoding="utf-8")
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert base64.b64decode(picture).startswith(PNG) and files["--plot"].read_bytes().startswith(PNG)
    plain = html.unescape(re.sub(r"<[^>]*>", "", text.split("<pre>")[1].split("</pre>")[0]))
    printed = io.StringIO()
    print_inspection(json.loads(files["--json"].read_text()), Console(file=printed, width=140))
    assert [line.rstrip() for line in plain.strip().splitlines()] == [
        line.rstrip() for line in printed.getvalue().strip().splitlines()
    ]
    assert "math" in plain and "singular task interference" in plain
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text, "no other file is needed"


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
