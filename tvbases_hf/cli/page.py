"""An inspection as one HTML page that needs no other file: what the command prints, its warnings and the picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..storage.output import writing

WIDTH = 140
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
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

    Raises OutputError for a file that cannot be written.
    """
    console = Console(record=True, file=io.StringIO(), width=WIDTH, highlight=False)
    for show in tables:
        show(console)
    page = PAGE.format(
        title=f"{len(found['tasks'])} task vectors over {html.escape(found['base'])}",
        warnings="\n".join(f'<p class="warning">warning: {html.escape(line)}</p>' for line in found["warnings"]),
        tables=console.export_html(inline_styles=True, code_format="{code}"),
        picture=base64.b64encode(picture).decode("ascii"),
    )
    with writing(file):
        file.write_text(page, encoding="utf-8")
