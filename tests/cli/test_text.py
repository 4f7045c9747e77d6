"""Names are text on every medium: the terminal, pictures, pages and cards show them, and do nothing that they say."""

from __future__ import annotations

import ast
import html
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from rich.table import Table

from commands.command_line import compress, inputs, refused, root, tvbases
from tvbases_hf.basis import Basis
from tvbases_hf.basis.adapters.verdict import adapter_card
from tvbases_hf.basis.info import AdapterInfo, BasisInfo, model_card
from tvbases_hf.cli.app import console
from tvbases_hf.cli.doctor import print_findings
from tvbases_hf.cli.page import write_page
from tvbases_hf.cli.page_style import SCRIPT
from tvbases_hf.merging import card as merging_card
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.text import (
    Terminal,
    code_block,
    code_span,
    in_html,
    in_markdown,
    in_picture,
    in_yaml,
    printable,
    quoted,
)
from zoo.hf_models import Family, read_state, save_state

pytest_plugins = ["zoo.hf_fixtures"]
NASTY = [
    "math[v1]",
    "out[/v2]",
    "[mergekit]",
    "[link=javascript:alert(1)]x[/link]",
    "[bold red]",
    ":smile:",
    "a|b",
    "<script>alert(1)</script>",
    '"); import os; ("',
    "it's",
    "back\\slash",
    "`code`",
    "``",
    "$x^2$",
    r"$\frac{$",
    "*bold* _under_ ~~gone~~",
    "[x](javascript:alert(1))",
    "&amp;",
    "数学 α é 👩‍🚀",
]
CONTROL = ["a\nb", "a\x1b[31mb", "\x1b]0;title\x07", "a\rb", "a\tb", "\x9b2J", "a\u202eb", "\u2028", "\ud800", "\x7f"]

PACKAGE = Path(__file__).parents[2] / "tvbases_hf"
INTEGRATIONS = Path(__file__).parents[2] / "integrations"
NO_PLAIN_YAML = ["a/b\nlicense: mit", "a: b", "yes # no", "- x", "yes", "1", "1.5", "null", "2026-01-01"]


def shown(*printed: Any, width: int = 200) -> str:
    file = io.StringIO()
    console = Terminal(file=file, width=width, force_terminal=False)
    for thing in printed:
        console.print(thing)
    return file.getvalue()


# --- one function per medium ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NASTY)
def test_the_terminal_shows_a_name_as_it_is_in_lines_tables_and_titles(name: str) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    assert shown(f"{name}: done") == f"{name}: done\n"
    assert shown(table).count(name) == 3


@pytest.mark.parametrize("name", CONTROL, ids=ascii)
def test_no_control_character_reaches_the_terminal(name: str) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    for text in (shown(name), shown(table), printable(name)):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert printable(name).isprintable() and printable(name) != name
    assert printable(name).encode("ascii").decode("unicode_escape") == name


@pytest.mark.parametrize("name", NASTY)
def test_printable_text_is_not_changed(name: str) -> None:
    assert printable(name) == name


@pytest.mark.parametrize("name", [*NASTY, *CONTROL], ids=ascii)
def test_html_is_the_name_again_when_it_is_read(name: str) -> None:
    assert not set(in_html(name)) & set("<>\"'") and html.unescape(in_html(name)) == printable(name)


@pytest.mark.parametrize("name", [*NASTY, *CONTROL], ids=ascii)
def test_a_string_in_a_snippet_is_the_name_again_when_it_is_run(name: str) -> None:
    assert ast.literal_eval(quoted(name)) == name and printable(quoted(name)) == quoted(name)
    ast.parse(f"basis.restore({quoted(name)}, out={quoted(name)})")


@pytest.mark.parametrize("name", ["owner/model", "owner/model@v1.0", *NO_PLAIN_YAML, *NASTY])
def test_a_string_in_a_header_is_the_name_again_when_it_is_read(name: str) -> None:
    assert yaml.safe_load(f"base_model: {in_yaml(name)}\ntags: [x]\n") == {"base_model": name, "tags": ["x"]}


@pytest.mark.parametrize("name", ["math", "law_v1", "org/model-7B", "a b.c", "数学"])
def test_plain_names_stay_plain_in_cards(name: str) -> None:
    assert in_markdown(name) == name and code_span(name) == f"`{name}`" and quoted(name) == f'"{name}"'


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").enable("strikethrough").render(text)


@pytest.mark.parametrize("name", [*NASTY, *CONTROL], ids=ascii)
def test_markdown_is_the_name_again_when_it_is_rendered(name: str) -> None:
    seen = html.escape(printable(name), quote=False)
    paragraph = rendered(f"x {in_markdown(name)} x").replace("&quot;", '"')
    assert paragraph == f"<p>x {seen} x</p>\n"
    table = rendered(f"| a | b |\n|---|---|\n| {in_markdown(name)} | 1 |\n").replace("&quot;", '"')
    assert f"<td>{seen}</td>\n<td>1</td>" in table
    span = rendered(f"x {code_span(name)} x").replace("&quot;", '"')
    assert span == f"<p>x <code>{seen}</code> x</p>\n"


def test_a_block_of_code_ends_where_it_ends() -> None:
    text = "a: 1\n```\n# <script>\n````\r\nb: \x1b 2\n"
    assert rendered(code_block(text, "yaml")) == (
        '<pre><code class="language-yaml">a: 1\n```\n# &lt;script&gt;\n````\nb: \\x1b 2\n</code></pre>\n'
    )


@pytest.mark.parametrize("name", [*NASTY, "$", "a$b", "$$"])
def test_a_picture_has_the_name_as_text(name: str) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.cbook import is_math_text

    assert not is_math_text(in_picture(name)) and in_picture(name).replace(r"\$", "$") == name


# --- and they are used ------------------------------------------------------------------------------------------------


def named(pair: Family, name: str) -> list[object]:
    return ["--base", pair.base, "--task", f"{name}={pair.tasks['math']}", "--task", f"code={pair.tasks['code']}"]


def test_reports_name_tasks_as_they_were_given(pair: Family, tmp_path: Path) -> None:
    names = [name for name in NASTY if len(name) < 12]
    sources = [*pair.tasks.values()] * len(names)
    tasks = [part for item in zip(names, sources, strict=False) for part in ("--task", f"{item[0]}={item[1]}")]
    for more in (["inspect"], ["compress", "-m", 1, "--out", tmp_path / "basis"]):
        with patch.object(console, "_width", 400):
            done = tvbases(*more, "--base", pair.base, *tasks)
        assert done.code == 0 and all(done.out.count(name) for name in names), done.out


def test_an_output_with_brackets_ends_well(pair: Family) -> None:
    """A closing tag that was never opened ended in a traceback, after the work."""
    out = root(pair) / "out[" / "v2]"
    assert tvbases("compress", *inputs(pair), "-m", 1, "--out", out).code == 0
    done = tvbases("compress", *inputs(pair), "-m", 1, "--out", out)
    assert done.code == 0 and "out[/v2]" in done.out.replace("\n", "")


def test_what_to_install_is_said_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvbases_hf.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda _: None)
    monkeypatch.setattr(doctor, "_mergekit_methods", lambda: 'missing; pip install "tvbases-hf[mergekit]"')
    file = io.StringIO()
    print_findings(doctor.examine(), Terminal(file=file, width=200))
    text = file.getvalue()
    assert text.count("tvbases-hf[mergekit]") == 2 and "tvbases-hf[peft]" in text and "\\[" not in text


def test_doctor_lists_every_extra_with_all_its_packages() -> None:
    from tvbases_hf.cli.doctor import EXTRAS

    declared: dict[str, set[str]] = {}
    for line in metadata.requires("tvbases-hf") or []:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == [\"']([\w-]+)", line)
        if name and extra:
            declared.setdefault(extra[1], set()).add(name[0])
    assert set(EXTRAS) == set(declared) - {"all", "docs", "test"}
    for extra, packages in EXTRAS.items():
        assert declared[extra] - {"tvbases-hf"} <= set(packages), extra


@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_escapes_in_the_name_of_a_tensor_do_not_reach_the_terminal(command: str, pair: Family) -> None:
    name = "model.\x1b]0;owned\x07\nlayers.0.weight"
    for path in (pair.base, *pair.tasks.values()):
        state = read_state(path)
        save_state(path, {**state, name: torch.full((2, 2), float("nan"))}, pair.base)
    arguments = compress(pair) if command == "compress" else ["inspect", *inputs(pair)]
    message = refused(root(pair), *arguments)
    assert message.isprintable() and r"\x1b]0;owned\x07\nlayers.0.weight" in message


def test_warnings_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    from tvbases_hf.cli.tables import warn

    warn(["a \x1b[2J", "b\nc"])
    assert capsys.readouterr().err == "warning: a \\x1b[2J\nwarning: b\\nc\n"


@pytest.mark.parametrize("name", NASTY)
def test_a_page_shows_names_and_has_no_link_and_no_script(name: str, pair: Family, tmp_path: Path) -> None:
    found = {"tasks": [name], "base": name, "warnings": [name]}
    table = Table(name, title=name)
    table.add_row(name)
    write_page(found, [lambda console: console.print(table)], b"", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count(f"<script>{SCRIPT}</script>") == 1, "ours, and no other"
    text = text.replace(f"<script>{SCRIPT}</script>", "")
    assert not re.search(r"<(script|a|b|i)\b", text) and "href" not in text.replace(html.escape(name), "")
    plain = html.unescape(re.sub(r"<[^>]*>", "", text.replace(html.escape(name), "NAME").replace(name, "NAME")))
    assert plain.count("NAME") + plain.count(name) >= 6


def test_a_picture_of_tasks_with_dollars_is_drawn(pair: Family) -> None:
    pytest.importorskip("matplotlib")
    done = tvbases("inspect", *named(pair, r"$\frac{$"), "--plot", root(pair) / "a.png")
    assert done.code == 0, done.err


def check_card(card: str, name: str) -> None:
    """A header with nothing more in it, a table whose rows have the columns of its head, snippets that are Python."""
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert set(yaml.safe_load(head)) <= {"library_name", "tags", "base_model", "base_model_relation"}
    text = rendered(body)
    assert "<script" not in text and "<a " not in text and "<td>1</td>" not in text
    rows = [row.count("<td>") for row in text.split("<tr>") if "<td>" in row]
    assert len(set(rows)) <= 1
    assert html.escape(printable(name)) in text.replace("'", "&#x27;")
    for block in re.findall(r'<code class="language-python">(.*?)</code>', text, re.DOTALL):
        constants = [node.value for node in ast.walk(ast.parse(html.unescape(block))) if isinstance(node, ast.Constant)]
        assert all(not isinstance(node, ast.Import) for node in ast.walk(ast.parse(html.unescape(block))))
        assert "path/to/this/directory" in constants


@pytest.mark.parametrize("name", [*NASTY, *CONTROL, "a/b\nlicense: x"], ids=ascii)
def test_the_card_of_a_basis_is_what_it_is_with_any_name(name: str, pair: Family) -> None:
    tasks = {name: pair.tasks["math"], "code": pair.tasks["code"]}
    info = Basis.build(Vectors.open(pair.base, tasks), 1).info
    for base in ("base", f"owner/{name}"):
        check_card(model_card(replace(info, base_id=base)), name)
        assert len(re.findall(r"^\|", model_card(info), re.MULTILINE)) == 4
        check_card(adapter_card(of_adapters(replace(info, base_id=base))), name)


def of_adapters(info: BasisInfo) -> BasisInfo:
    overlap: dict[str, float] = dict.fromkeys(("input", "output", "input_by_chance", "output_by_chance"), 0.5)
    two = [0.5] * len(info.tasks)
    return replace(info, adapters=AdapterInfo(1.0, "float32", 1, two, two, {"ae": 0.5}, 0.0, overlap))


@pytest.mark.parametrize("name", [*NASTY, *CONTROL], ids=ascii)
@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_the_card_of_a_merge_is_what_it_is_with_any_name(kind: str, name: str) -> None:
    report = {"kind": kind, "base": f"owner/{name}", "method": "ties", "models": [name, "code"], "dtype": "float32"}
    report |= {"changed": 1, "tensors": 2, "missing": {name: 1}, "error": {"all": 0.5, name: 0.5}, "ranks": {1: 1}}

    class Recipe:
        recipe = f"models: # ```\n```\n<script> {name}\n"

    text = merging_card.model_card(Recipe(), report)  # type: ignore[arg-type]
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert set(yaml.safe_load(head)) <= {"library_name", "tags", "base_model", "base_model_relation"}
    html_text = rendered(body)
    assert "<script" not in html_text and "<a " not in html_text
    assert html.escape(printable(name)) in html_text.replace("'", "&#x27;")
    if kind == "adapter":
        rows = [row.count("<td>") for row in html_text.split("<tr>") if "<td>" in row]
        assert rows == [2, 2]


# What may be given to print and echo as it is: a version, JSON, the path of our own package, and what was escaped.
PRINTED = {"printable", "library_version", "json_format.dumps", "include_path"}


def calls(file: Path) -> Iterator[ast.Call]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_nothing_prints_in_another_way() -> None:
    """Consoles are Terminals, and what is printed without one was escaped."""
    seen = set()
    for file in [*PACKAGE.rglob("*.py"), *INTEGRATIONS.rglob("*.py")]:
        for call in calls(file):
            name = ast.unparse(call.func)
            assert name.rpartition(".")[2] != "Console", f"{file}:{call.lineno}"
            if name in ("print", "typer.echo", "click.echo", "sys.stdout.write", "sys.stderr.write"):
                inner = {ast.unparse(node.func) for node in ast.walk(call) if isinstance(node, ast.Call)}
                seen |= inner & PRINTED
                assert inner & PRINTED, f"{file}:{call.lineno}"
    assert seen == PRINTED
