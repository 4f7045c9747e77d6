"""How much is trained and painted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .drawing import HOUSE, PERSON, STYLES
from .model import Size, Training
from .ways import DEFAULT, LOWER, PLAIN, SAME_AS_PLAIN, WAYS

APART, FAMILY = "apart", "house"
RANKS = {name: 16 if name in ("slanted", "outlined", "watercolour", "neon") else 8 for name in STYLES}


@dataclass(frozen=True)
class Mixed:
    """Two LoRAs to be mixed: of the family that ``group`` names, or a person and a style."""

    group: str
    first: str
    second: str

    @property
    def styles(self) -> tuple[str, ...]:
        """What a perfect mix shows."""
        shown = tuple(name for name in (self.first, self.second) if name != PERSON)
        return (*shown, HOUSE) if self.group == FAMILY else shown

    @property
    def wanted(self) -> tuple[str, ...]:
        """The styles that are the LoRAs' own."""
        return tuple(name for name in self.styles if name != HOUSE)


@dataclass(frozen=True)
class Settings:
    """``needed``: the share of right contents without which nothing is mixed. ``screened``: pairs for the scales.

    ``ways`` are compared at the best scale of each, ``at_one`` also at scale 1, ``of_persons`` also with a person;
    those that are ``repeated`` with the LoRAs of every seed, the others with those of the first.
    """

    name: str
    size: Size
    base: Training
    lora: Training
    judge_steps: int
    judge_examples: int
    seeds: tuple[int, ...]
    groups: tuple[str, ...]
    ways: tuple[str, ...]
    repeated: tuple[str, ...]
    at_one: tuple[str, ...]
    of_persons: tuple[str, ...]
    styles: tuple[str, ...]
    scales: tuple[float, ...]
    screened: int
    repeats: int
    screen_repeats: int
    steps: int
    needed: float
    contents: str = "shapes"
    """Or ``digits``: scikit-learn's."""

    def pairs(self, group: str) -> list[Mixed]:
        if group == PERSON:
            return [Mixed(group, PERSON, style) for style in self.styles]
        return [Mixed(group, *pair) for pair in itertools.combinations(self.styles, 2)]

    def ways_of(self, group: str) -> tuple[str, ...]:
        return tuple(way for way in self.ways if way in self.of_persons) if group == PERSON else self.ways

    def screen(self, group: str) -> list[Mixed]:
        """Some pairs in which every style is as often as any other, about."""
        found = self.pairs(group)
        return found[:: max(1, len(found) // self.screened)][: self.screened]

    def loras(self) -> Iterator[tuple[str, str]]:
        """Family and style of all LoRAs; the house's own before those that go on from it."""
        if APART in self.groups or PERSON in self.groups:
            yield from ((APART, style) for style in self.styles)
        if FAMILY in self.groups:
            yield from ((FAMILY, style) for style in (HOUSE, *self.styles))
        if PERSON in self.groups:
            yield APART, PERSON

    def parts(self) -> Iterator[Settings]:
        """The same questions in the order in which they are asked: seed by seed, group by group."""
        for seed, group in itertools.product(self.seeds, self.groups):
            ways = self.ways if seed == self.seeds[0] else self.repeated
            yield replace(self, seeds=(seed,), groups=(group,), ways=ways)


FULL = Settings(
    name="full",
    size=Size(),
    base=Training(2600, 32, 2e-3),
    lora=Training(300, 16, 3e-3, 4000),
    judge_steps=1500,
    judge_examples=4000,
    seeds=(0, 1),
    groups=(APART, FAMILY, PERSON),
    ways=tuple(way for way in WAYS if way not in SAME_AS_PLAIN),
    repeated=(*tuple(WAYS)[:8], *LOWER),
    at_one=(PLAIN, "mean", "unique", DEFAULT, "tsv", "sum, calibrated", *LOWER),
    of_persons=tuple(WAYS)[:8],
    styles=STYLES,
    scales=(0.5, 0.7, 0.85, 1.0, 1.3, 1.8),
    screened=5,
    repeats=2,
    screen_repeats=1,
    steps=8,
    needed=0.97,
)
# The main rows alone, on other contents.
DIGITS = replace(
    FULL,
    name="digits",
    contents="digits",
    seeds=(0,),
    groups=(APART, FAMILY),
    ways=(PLAIN, "unique", DEFAULT),
    repeated=(PLAIN, "unique", DEFAULT),
    at_one=(PLAIN, "unique", DEFAULT),
    of_persons=(),
)
QUICK = Settings(
    name="quick",
    size=Size(1, 1, 1),
    base=Training(3, 4, 1e-3, 40),
    lora=Training(2, 4, 1e-3, 40),
    judge_steps=3,
    judge_examples=256,
    seeds=(0,),
    groups=(APART, FAMILY, PERSON),
    ways=(PLAIN, "unique", DEFAULT, "steps"),
    repeated=(PLAIN, "unique", DEFAULT, "steps"),
    at_one=(PLAIN,),
    of_persons=(PLAIN, "steps"),
    styles=STYLES[4:],
    scales=(0.5, 1.0),
    screened=1,
    repeats=1,
    screen_repeats=1,
    steps=1,
    needed=0.0,
)
