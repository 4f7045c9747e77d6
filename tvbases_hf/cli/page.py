"""A report as one HTML page that needs no other file: what a command prints, as tables that sort, and its pictures.

Nothing is loaded from elsewhere, and the page says so to the browser: its one script and its style are known by their
hashes, and no other may run. Names that come from users are text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..storage.reports import MARK, write_whole
from ..text import in_html
from ..version import library_version
from .page_style import SCRIPT, STYLE

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src '{style_hash}';
 script-src '{script_hash}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="made">{made}</p>
{command}{warnings}
{content}
</main>
<script>{script}</script>
</body>
</html>
"""


class PageConsole:
    """What a command's ``show`` prints to, as sections of a page instead of lines."""

    width = 100_000

    def __init__(self) -> None:
        self.sections: list[str] = []

    def print(self, *things: Any, **_: Any) -> None:
        for thing in things:
            table = getattr(thing, "columns", None) is not None
            self.sections.append(_table(thing) if table else _paragraphs(str(thing)))


def write_page(
    found: dict[str, Any],
    shows: Sequence[Callable[[Any], None]],
    picture: bytes | None,
    file: Path,
    *,
    title: str = "",
    command: str = "",
    about_picture: str = "",
) -> None:
    """Write what ``shows`` print, the warnings of a report and its picture (a PNG) to ``file``.

    Raises OutputError for a file that cannot be written, or that is not ours.
    """
    console = PageConsole()
    for show in shows:
        show(console)
    content = [*console.sections, *([] if not picture else [_figure(picture, about_picture)])]
    title = title or f"{len(found['tasks'])} task vectors over {found['base']}"
    warnings = found.get("warnings", found.get("notes", ()))
    page = PAGE.format(
        generator=in_html(f"{MARK} {library_version()}"),
        title=in_html(title),
        made=f"tvbases-hf {in_html(library_version())}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        command=f"<pre>{in_html('$ ' + command)}</pre>\n" if command else "",
        warnings="\n".join(f'<p class="warning">warning: {in_html(line)}</p>' for line in warnings),
        content="\n".join(content),
        style=STYLE,
        style_hash=_hash(STYLE),
        script=SCRIPT,
        script_hash=_hash(SCRIPT),
    )
    write_whole(file, page.encode("utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{in_html(line)}</p>" for line in text.splitlines() if line.strip())


def _table(table: Any) -> str:
    """With its title, what it means, and headings that sort it."""
    names = getattr(table, "names", 1)
    headings = [str(column.header) for column in table.columns]
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    parts = ["<section>"]
    if table.title:
        parts.append(f"<h2>{in_html(str(table.title).strip())}</h2>")
    if about := getattr(table, "about", ""):
        parts.append(f"<p>{in_html(about)}</p>")
    parts.append('<div class="table" tabindex="0"><table>')
    if table.show_header:
        cells = (f'<th scope="col">{_button(heading)}</th>' for heading in headings)
        parts.append(f"<thead><tr>{''.join(cells)}</tr></thead>")
    parts.append("<tbody>")
    parts += (f"<tr>{''.join(_cell(cell, place < names) for place, cell in enumerate(row))}</tr>" for row in rows)
    parts.append("</tbody></table></div></section>")
    return "\n".join(parts)


def _button(heading: str) -> str:
    return f'<button type="button">{in_html(heading.replace(chr(10), " "))}</button>' if heading else ""


def _cell(text: str, is_name: bool) -> str:
    return f'<th scope="row">{in_html(text)}</th>' if is_name else f"<td>{in_html(text)}</td>"


def _figure(picture: bytes, about: str) -> str:
    data = base64.b64encode(picture).decode("ascii")
    said = in_html(about)
    return f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>'
