"""Names, paths and messages as text, whatever they hold: one function per medium, used by all that write to it.

A task's name, a path, a tensor's name come from users and from files. On a terminal, in a picture, on a page and in a
card they are shown as they are: never as markup, as a control sequence of the terminal, or as code.
"""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

from rich.console import Console, ConsoleDimensions
from rich.text import Text

# The width of what is no terminal.
PIPED = 100_000
# Joiners of letters: invisible, and part of words (Persian, Hindi) and of emoji.
JOINERS = "\u200c\u200d"
# What Markdown may take for more than itself; "_" only beside a space or at an end, where it could begin an emphasis.
MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
# A model's id, with its owner: nothing that YAML reads as a number, a date or a truth value.
PLAIN_YAML = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?", re.ASCII)


class Terminal(Console):
    """A rich console on which strings are text: no markup, no emoji codes, no control characters but line ends."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    @property
    def size(self) -> ConsoleDimensions:
        """Of a terminal; lines that go into a file or a program are as long as they are."""
        return super().size if self.is_terminal or self._width is not None else ConsoleDimensions(PIPED, 25)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """As rich does, but lines of text end at spaces only, and nothing is cut off.

        ``soft_wrap``: one line, whatever its length, as for what names a path.
        """
        if objects and all(isinstance(thing, str) for thing in objects):
            text = " ".join(printable(thing, "\n") for thing in objects)
            objects = (text if soft_wrap else "\n".join(wrapped(text, self.width)),)
            soft_wrap = True
        options.setdefault("crop", False)
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def on_broken_pipe(self) -> None:
        """For whoever runs the command to say."""
        raise BrokenPipeError

    def render_str(self, text: str, *arguments: Any, **options: Any) -> Text:
        return super().render_str(printable(text, "\n"), *arguments, **options)


def printable(text: object, kept: str = "") -> str:
    """As one line of what can be seen: control and other invisible characters as their escapes (\\x1b)."""
    kept += JOINERS
    return "".join(c if c.isprintable() or c in kept else _escape(c) for c in str(text))


def wrapped(text: str, width: int) -> list[str]:
    """Lines that end at spaces only: a path or a number that is longer than a line stays whole."""
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    lines = (textwrap.wrap(line, max(width, 1), **how) if len(line) > width else [line] for line in text.split("\n"))
    return [part for line in lines for part in (line or [""])]


def in_picture(text: object) -> str:
    """For matplotlib, which sets what is between two dollars as mathematics."""
    return printable(text).replace("$", r"\$")


def in_html(text: object) -> str:
    """For an element or a quoted attribute of a page."""
    return html.escape(printable(text))


def in_markdown(text: object) -> str:
    """For a paragraph, a heading or a cell of a table."""
    return html.escape(MARKDOWN.sub(r"\\\g<0>", printable(text)), quote=False)


def code_span(text: object) -> str:
    """``text`` in backticks, more of them than it has in a row itself."""
    shown = printable(text)
    ticks = "`" * (_longest_run(shown) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def code_block(text: str, language: str) -> str:
    """Lines of code that no line of theirs can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    lines = printable(text.replace("\r", ""), "\n\t").rstrip()
    return f"{fence}{language}\n{lines}\n{fence}"


def quoted(text: object) -> str:
    """A string of Python, in double quotes."""
    return '"' + printable(str(text).replace("\\", "\\\\").replace('"', '\\"')) + '"'


def in_yaml(text: str) -> str:
    """A string of YAML, in quotes unless it is a model's id."""
    return text if PLAIN_YAML.fullmatch(text) else quoted(text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
