"""The tables that pages show of the methods are what these declare; `make tables` writes them."""

from __future__ import annotations

import os
from pathlib import Path

from tvbases_hf.methods.registry import METHODS
from tvbases_hf.options import markdown_table

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "methods.md"
START, END = "<!-- methods: written by make tables -->\n", "<!-- end of methods -->\n"


def test_the_guide_shows_the_methods_as_they_are_declared() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    current = f"{before}{START}\n{markdown_table(METHODS.values(), 'method')}\n\n{END}{after}"
    if os.environ.get("TVBASES_WRITE_TABLES"):
        GUIDE.write_text(current, encoding="utf-8")
    assert GUIDE.read_text(encoding="utf-8") == current, "the table of methods is out of date: run `make tables`"
