"""What style mixing tells its users: how much of each style is shared, by block, by pair and by chance."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from ..algebra.delta import LowRank
from ..algebra.products import square_norm
from ..errors import ParameterError
from ..methods.devec import Options, WholeSpaceError, chance_limit, chance_share, decompose
from ..sheet import Sheet
from .mixing import Part, Recipe, Styles

BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.)")
# A style of which less than this is shared is mixed as it is, for all that a picture can show.
HARDLY = 1e-3
EMPTY = 1e-9


@dataclass
class Tally:
    """Squared norms, summed over the weights that went by; ``add`` takes each part of a mix once."""

    styles: Styles
    recipe: Recipe
    pairs: bool = False
    """Also what every two styles share, which costs two decompositions of each pair."""
    groups: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    pair_squares: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    crowded: dict[str, float] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        group = self.groups.setdefault(self._group(part), {})
        for name, square in part.whole.items():
            row = group.setdefault(name, [0.0, 0.0, 0.0])
            row[0] += part.shared[name]
            row[1] += square
            row[2] += part.kept[name]
        place = part.place.name
        if part.fills:
            self.filled.append(place)
        self._add_chance(part, place)
        if self.pairs:
            self._add_pairs(part)

    def _group(self, part: Part) -> str:
        block = BLOCK.match(part.place.module)
        name = block.group(0) if block else "other"
        return name if len(self.styles.components) == 1 else f"{part.place.component}: {name}"

    def _add_chance(self, part: Part, place: str) -> None:
        """Where a rank is so large for its weight that random subspaces would look shared."""
        options = self.recipe.options
        side = part.place.shape[0 if options.side == "column" else 1]
        ranks = tuple(part.place.ranks.values())
        # The mapping of "mean" has limits of its own; near the limit simulation tells.
        if len(ranks) < 2 or part.fills or min(ranks) / side < chance_limit(options.threshold) / 2:
            return
        subspace = "chain" if options.subspace == "angles" else options.subspace
        share = chance_share(side, tuple(min(rank, side) for rank in ranks), options.threshold, subspace)
        if share > 0:
            self.crowded[place] = share

    def _add_pairs(self, part: Part) -> None:
        """Both styles' energy in what the two share, whatever the others do."""
        options = self.recipe.options
        lone = Options(options.threshold, "chain", "joint", options.side, options.rank, options.factored_rank)
        changes = {name: change for name, change in self.styles.changes(part.place).items() if part.whole[name] > 0}
        for pair in itertools.combinations(self.styles.names, 2):
            total = self.pair_squares.setdefault(pair, [0.0, 0.0])
            total[1] += sum(part.whole.get(name, 0.0) for name in pair)
            if all(name in changes for name in pair):
                total[0] += _shared_square([changes[name] for name in pair], lone)

    def report(self) -> dict[str, Any]:
        """Shares of squared norms, by group and style, and what to make of them; see ``notes``.

        Raises ParameterError where nothing would be mixed, as with the unique components of identical styles.
        """
        names = self.styles.names
        total = {name: [0.0, 0.0, 0.0] for name in names}
        for group in self.groups.values():
            for name, row in group.items():
                total[name] = [a + b for a, b in zip(total[name], row, strict=True)]
        shares = {name: _ratio(row[0], row[1]) for name, row in total.items()}
        kept = {name: _ratio(row[2], row[1]) for name, row in total.items()}
        found = {
            "styles": {name: self._style(name) for name in names},
            "recipe": recipe_words(self.recipe),
            "modules": len(self.styles.places),
            "shared": {**{group: _shares(rows, names) for group, rows in self.groups.items()}, "all": shares},
            "kept": kept,
            "left_whole": self.filled,
            "by_chance": self.crowded,
            "pairs": {" + ".join(pair): _ratio(*squares) for pair, squares in self.pair_squares.items()},
        }
        self._refuse_nothing(total, shares)
        return found | {"notes": self._notes(total, shares)}

    def _style(self, name: str) -> dict[str, Any]:
        places = [place for place in self.styles.places if name in place.ranks]
        ranks = [place.ranks[name] for place in places]
        return {"modules": len(places), "rank": [min(ranks), max(ranks)]}

    def _refuse_nothing(self, total: dict[str, list[float]], shares: dict[str, float]) -> None:
        if any(row[2] > EMPTY * row[1] for row in total.values()):
            return
        names, what = ", ".join(total), self.recipe.component
        if not any(row[1] for row in total.values()):
            raise ParameterError(f"{names}: all changes are zero; there is nothing to mix")
        if what == "shared":
            raise ParameterError(
                f"{names} share nothing at threshold {self.recipe.options.threshold:g}, so their shared component is "
                "empty; lower the threshold, or mix the full or the unique components"
            )
        raise ParameterError(
            f"{names}: the unique component of every style is empty: {min(shares.values()):.1%} of each is shared with "
            f"the others at threshold {self.recipe.options.threshold:g}. Are they the same file? To mix one copy of "
            "what they share, give shared_weight 1"
        )

    def _notes(self, total: dict[str, list[float]], shares: dict[str, float]) -> list[str]:
        threshold = self.recipe.options.threshold
        notes = [
            f'"{name}" is empty in this mix: all of it is shared with the other styles'
            for name, row in total.items()
            if row[1] > 0 and row[2] <= EMPTY * row[1]
        ]
        if self.recipe.component == "unique" and max(shares.values()) < HARDLY:
            notes.append(self._nothing_shared(max(shares.values()), threshold))
        if self.filled:
            notes.append(
                f"{len(self.filled)} of {len(self.styles.places)} weights were left whole, since a style's rank fills "
                f"all their directions (first: {self.filled[0]})"
            )
        if self.crowded:
            first, share = next(iter(self.crowded.items()))
            notes.append(
                f"{len(self.crowded)} of {len(self.styles.places)} weights have styles of so large a rank that random "
                f"ones would share up to {max(self.crowded.values()):.0%} of their directions at threshold "
                f"{threshold:g} (first: {first}, {share:.0%}); raise it"
            )
        return notes

    def _nothing_shared(self, most: float, threshold: float) -> str:
        text = (
            f"the styles share nothing to speak of at threshold {threshold:g} (at most {most:.1%} of a style), so that "
            "their unique components are the styles themselves and this mix is the plain sum"
        )
        joint = self.recipe.options.pool == "joint" and len(self.styles.names) > 2
        pairs = [_ratio(*squares) for squares in self.pair_squares.values()]
        if joint and (not pairs or max(pairs) >= HARDLY):
            text += '; pool "iterative" also removes what only two of them share'
        return text


def recipe_words(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain words and numbers, for reports and for the header of a file."""
    return {
        "component": recipe.component,
        **({"shared_weight": recipe.shared_weight} if recipe.shared_weight else {}),
        **({} if recipe.method is None else {"method": {"name": recipe.method.method.name, **recipe.method.options}}),
        **{key: value for key, value in asdict(recipe.options).items() if key != "rank"},
    }


def print_styles(found: dict[str, Any], console: Console, *, blocks: bool = False) -> None:
    """One line per style; with ``blocks`` a table of every block and pair."""
    names = list(found["styles"])
    threshold = found["recipe"]["threshold"]
    table = Sheet("style", "modules", "rank", "scale", "shared", "in the mix")
    table.title = f"{found['recipe']['component']} components, threshold {threshold:g}, pool {found['recipe']['pool']}"
    if "method" in found["recipe"]:
        table.title += f", merged by {found['recipe']['method']['name']}"
    for name in names:
        style, (least, most) = found["styles"][name], found["styles"][name]["rank"]
        rank = str(most) if least == most else f"{least}-{most}"
        shared, kept = found["shared"]["all"][name], found["kept"][name]
        table.add_row(name, str(style["modules"]), rank, f"{found['scales'][name]:g}", f"{shared:.1%}", f"{kept:.1%}")
    console.print(table)
    if blocks:
        title = "share of each style's squared norm that is shared"
        rows = Sheet("block", *names, title=title)
        for group, shares in found["shared"].items():
            rows.add_row(group, *(f"{shares[name]:.1%}" if name in shares else "-" for name in names))
        console.print(rows)
        pairs = Sheet("pair", "shared", title="shared by two styles alone")
        for pair, share in found["pairs"].items():
            pairs.add_row(pair, f"{share:.1%}")
        console.print(pairs)
    if "out" in found:
        console.print(f"{found['out']}: the mix, in {found['dtype']}", highlight=False, soft_wrap=True)


def _shared_square(changes: list[LowRank], options: Options) -> float:
    try:
        found = decompose(changes, options)
    except WholeSpaceError:
        return 0.0
    return sum(square_norm(part) for part in found.shared)


def _shares(rows: dict[str, list[float]], names: tuple[str, ...]) -> dict[str, float]:
    return {name: _ratio(rows[name][0], rows[name][1]) for name in names if name in rows}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
