"""An inspection as one HTML page that needs no other file: what the command prints, its warnings and the picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..storage.reports import MARK, write_whole
from ..text import Terminal, in_html
from ..version import library_version

WIDTH = 140
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
pre {{ font-family: monospace; line-height: 1.2; overflow-x: auto; }}
img {{ max-width: 100%; }}
.warning {{ color: #a40000; }}
</style>
</head>
<body>
<h1>{title}</h1>
{warnings}
<pre>{tables}</pre>
<img alt="Similarity, energy left unexplained, interference and decay" src="data:image/png;base64,{picture}">
</body>
</html>
"""


def write_page(found: dict[str, Any], tables: Sequence[Callable[[Console], None]], picture: bytes, file: Path) -> None:
    """Write what ``tables`` print, the warnings of an inspection and its picture (a PNG) to ``file``.

    Raises OutputError for a file that cannot be written, or that is not ours.
    """
    console = Terminal(record=True, file=io.StringIO(), width=WIDTH, highlight=False)
    for show in tables:
        show(console)
    page = PAGE.format(
        generator=in_html(f"{MARK} {library_version()}"),
        title=in_html(f"{len(found['tasks'])} task vectors over {found['base']}"),
        warnings="\n".join(f'<p class="warning">warning: {in_html(line)}</p>' for line in found["warnings"]),
        tables=console.export_html(inline_styles=True, code_format="{code}"),
        picture=base64.b64encode(picture).decode("ascii"),
    )
    write_whole(file, page.encode("utf-8"))
