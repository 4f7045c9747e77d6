"""A table that a terminal of any width shows: numbers are never cut, and names stay apart from one another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .text import printable, wrapped

# A name is not made shorter than this, and a heading not wrapped into less.
LEAST_NAME, LEAST_HEADING = 10, 8
GAP = "…"


class Sheet(Table):
    """Names in the first columns, numbers in all others.

    Where it is too wide, headings are wrapped, names and headings shortened in their middle, and then the numbers stand
    in several tables below one another, each with the names. ``about`` says in a sentence what the figures are; pages
    show it.
    """

    def __init__(self, *headings: str, title: str = "", about: str = "", names: int = 1, **options: Any) -> None:
        super().__init__(title=title or None, **options)
        self.about, self.names = about, names
        for place, heading in enumerate(headings):
            self.add_column(heading, justify="left" if place < names else "right")

    def cells(self) -> list[list[str]]:
        """By column, as text."""
        return [[printable(cell) for cell in column.cells] for column in self.columns]

    def fits(self, width: int) -> bool:
        """Whether it is one table, with whole names."""
        headings = [printable(column.header) for column in self.columns]
        return _needed(list(zip(headings, self.cells(), strict=True))) <= width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield from (Text(line, style="table.title") for line in wrapped(str(self.title), options.max_width))
        headings = [printable(column.header) for column in self.columns]
        for columns in _fitted(headings, self.cells(), self.names, options.max_width):
            table = self._part(columns)
            yield from console.render(table, options.update(width=max(options.max_width, _needed(columns))))

    def _part(self, columns: Sequence[tuple[str, list[str]]]) -> Table:
        table = Table(box=self.box, show_header=self.show_header)
        for place, (heading, _) in enumerate(columns):
            table.add_column(heading, justify="left" if place < self.names else "right", no_wrap=True)
        for row, told in zip(zip(*(cells for _, cells in columns), strict=True), self.rows, strict=True):
            table.add_row(*row, end_section=told.end_section)
        return table


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Every name in at most ``width`` cells: long ones lose their middle, so that different names stay different.

    Where they differ in their middle alone, it is that which stays; where nothing else helps, they are numbered.
    """
    long = list(dict.fromkeys(name for name in names if cell_len(name) > width))
    room = max(2, width - 1)
    for start in sorted(range(1, room), key=lambda start: abs(2 * start - room)):
        found = {name: _ends(name, start, room - start) for name in long}
        if len({*found.values(), *names} - {*long}) == len(set(names)):
            return [found.get(name, name) for name in names]
    before, after = map(_common, (long, [name[::-1] for name in long]))
    found = {name: GAP + name[before : max(before + 1, len(name) - after)] + GAP for name in long}
    if max(map(cell_len, found.values())) <= width and len({*found.values()}) == len(long):
        room = width - max(map(cell_len, found.values()))
        return [f"{_ends(name, room, 0)[:-1]}{found[name]}" if name in found else name for name in names]
    numbers = {name: f"{GAP}{number}" for number, name in enumerate(long, 1)}
    return [
        _ends(name, max(1, width - len(numbers[name])), 0)[:-1] + numbers[name] if name in numbers else name
        for name in names
    ]


def _common(names: Sequence[str]) -> int:
    """How many characters all of them begin with."""
    columns = zip(*names, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _ends(name: str, start: int, end: int) -> str:
    """The first and the last cells of a name, with a gap between."""
    head = next(name[:count] for count in range(len(name), -1, -1) if cell_len(name[:count]) <= start)
    tail = next(name[count:] for count in range(len(name) + 1) if cell_len(name[count:]) <= end)
    return head + GAP + tail


def _fitted(
    headings: list[str], cells: list[list[str]], names: int, width: int
) -> Iterator[list[tuple[str, list[str]]]]:
    """The headings and cells of one table, or of several, that are at most ``width`` cells wide."""
    whole = list(zip(headings, cells, strict=True))
    if _needed(whole) <= width:
        yield whole
        return
    narrow = list(zip(map(_narrow, headings, cells), cells, strict=True))
    for columns in (narrow, [*narrow[:names], *_with_short_headings(narrow[names:])]):
        spare = width - _needed(columns[names:]) - 3 * names
        if spare >= names * LEAST_NAME:
            yield [*_with_short_names(columns[:names], spare), *columns[names:]]
            return
    columns = [*narrow[:names], *_with_short_headings(narrow[names:])]
    of_names = _with_short_names(columns[:names], max(names * LEAST_NAME, width // 3))
    for part in _batches(columns[names:], width - _needed(of_names)):
        yield [*of_names, *part]


def _needed(columns: Sequence[tuple[str, list[str]]]) -> int:
    """Cells from border to border."""
    return 1 + sum(3 + _width(heading, cells) for heading, cells in columns)


def _width(heading: str, cells: Sequence[str]) -> int:
    return max(map(cell_len, [*heading.split("\n"), *cells]), default=0)


def _narrow(heading: str, cells: list[str]) -> str:
    """A heading on as many lines as it takes to be no wider than its cells or its longest word."""
    least = max([LEAST_HEADING, *map(cell_len, cells), *map(cell_len, heading.split())])
    return "\n".join(wrapped(heading, least))


def _with_short_headings(columns: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Headings that are names, no wider than their cells."""
    least = max([LEAST_HEADING, *(cell_len(cell) for _, cells in columns for cell in cells)])
    short = shortened([heading.replace("\n", " ") for heading, _ in columns], least)
    return [
        (heading if _width(heading, ()) <= least else other, cells)
        for (heading, cells), other in zip(columns, short, strict=True)
    ]


def _with_short_names(columns: list[tuple[str, list[str]]], spare: int) -> list[tuple[str, list[str]]]:
    """Columns of names in ``spare`` cells: a column that needs less than its share leaves the rest to the others."""
    fitted, left = {}, len(columns)
    everything = [cell for _, cells in columns for cell in cells]
    for place in sorted(range(len(columns)), key=lambda place: _width(*columns[place])):
        heading, cells = columns[place]
        share = max(LEAST_NAME, spare // left)
        short = dict(zip(everything, shortened(everything, share), strict=True))
        fitted[place] = (heading, [short[cell] for cell in cells])
        spare, left = spare - _width(*fitted[place]), left - 1
    return [fitted[place] for place in range(len(columns))]


def _batches(columns: list[tuple[str, list[str]]], width: int) -> Iterator[list[tuple[str, list[str]]]]:
    """As many columns at a time as fit, and at least one."""
    batch: list[tuple[str, list[str]]] = []
    for column in columns:
        if batch and _needed([*batch, column]) - 1 > width:
            yield batch
            batch = []
        batch.append(column)
    yield batch


def pairs_by(matrix: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Places off the diagonal of a symmetric matrix, those of the largest values first."""
    pairs = itertools.combinations(range(len(matrix)), 2)
    return sorted(pairs, key=lambda pair: -matrix[pair[0]][pair[1]])
