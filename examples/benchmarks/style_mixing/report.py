"""RESULTS-STYLES.md, from the answers that there are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.claims import Claim, verdicts
from evidence.markdown import table
from evidence.runner import Answer, Answers

from .drawing import PERSON
from .studies import BASE, BEST, DRAWN, FINAL, LORAS, ONE, SCREEN
from .ways import DEFAULT, PLAIN, WAYS
from .workshop import Workshop

GROUPS = {
    "apart": "Two styles that were trained apart",
    "house": "Two styles that go on from one house style",
    "cat": "A person and a style",
}
# Of Student's distribution, by degrees of freedom: 95 % of it lie within.
QUANTILES = {1: 12.7, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 14: 2.14, 29: 2.05}


@dataclass(frozen=True)
class Cell:
    """All answers to one way at one scale, of several seeds: numbers of every picture, in one order."""

    values: dict[str, list[float]]
    scale: float

    @classmethod
    def of(cls, answers: Mapping[int, Answer]) -> Cell:
        names = ("content", "styles", "both", "distance", "apart", "pair")
        values: dict[str, list[float]] = {n: [v for a in answers.values() for v in a[n]] for n in names}
        values["seed"] = [seed for seed, a in answers.items() for _ in a["pair"]]
        return cls(values, next(iter(answers.values()))["scale"])

    @property
    def count(self) -> int:
        return len(self.values["pair"])

    def mean(self, name: str) -> float:
        return sum(self.values[name]) / self.count

    def minus(self, other: Cell, name: str = "both") -> Difference:
        """Over the seeds that both have."""
        seeds = {*self.values["seed"]} & {*other.values["seed"]}
        mine, others = self._by_pair(name, seeds), other._by_pair(name, seeds)
        by_pair = {p: [a - b for a, b in zip(mine[p], others[p], strict=True)] for p in mine}
        apart = [value for values in by_pair.values() for value in values]
        pairs = [sum(values) / len(values) for values in by_pair.values()]
        return Difference(sum(apart) / len(apart), _half(apart, 1.96), _half(pairs, quantile(len(pairs) - 1)))

    def _by_pair(self, name: str, seeds: Set[float]) -> dict[float, list[float]]:
        found: dict[float, list[float]] = {}
        for pair, seed, value in zip(self.values["pair"], self.values["seed"], self.values[name], strict=True):
            if seed in seeds:
                found.setdefault(pair, []).append(value)
        return found


@dataclass(frozen=True)
class Difference:
    """Of two cells; half widths of 95 % intervals, over pictures of the same noise and over pairs of LoRAs."""

    mean: float
    pictures: float
    pairs: float


def quantile(freedom: int) -> float:
    return QUANTILES[min((known for known in QUANTILES if known >= freedom), default=29)]


def _half(values: Sequence[float], width: float) -> float:
    if len(values) < 2:
        return math.inf
    mean = sum(values) / len(values)
    return width * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def cells(found: dict[str, Answers], group: str, scale: str) -> dict[str, Cell]:
    """By way, of all seeds of which it is answered."""
    result = {}
    for way in (DRAWN, *WAYS):
        answers = {
            q["seed"]: a for q, a in found[FINAL.name] if (q["group"], q["way"], q["scale"]) == (group, way, scale)
        }
        if answers:
            result[way] = Cell.of(answers)
    return result


def ranked(of: dict[str, Cell]) -> list[str]:
    """Best first."""
    return sorted(of, key=lambda way: -of[way].mean("both"))


def results(workshop: Workshop, found: dict[str, Answers], picture: Path | None, out: Path) -> str:
    """What is answered so far; ``picture`` is shown by its path from the directory of ``out``."""
    command, kept = "`make bench-styles` (`python examples/benchmarks/bench_styles.py`)", "styles"
    if workshop.settings.contents == "digits":
        command, kept = "`python examples/benchmarks/bench_styles.py --digits`", "styles_digits"
    parts = [
        "# Mixes of style LoRAs on a small Flux, by every way\n",
        f"Written by {command}; what was trained and painted is kept, and the next run goes on from it, or from the "
        f"answers behind these tables (answers/{kept}.tar.gz).\n",
        f"![Content, styles, mixes and the drawn truth]({os.path.relpath(picture, out.parent)})" if picture else "",
        _missing(workshop, found),
        *_what(workshop, found),
        verdicts(claims(workshop, found)),
        *(part for group in workshop.settings.groups for part in _group(found, group)),
        *_alone(found),
        _cost(found),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _missing(workshop: Workshop, found: dict[str, Answers]) -> str:
    asked = {study.name: len(list(study.questions(workshop.settings))) for study in (BASE, LORAS, SCREEN, FINAL)}
    if all(len(found[name].found) == count for name, count in asked.items()):
        return ""
    counts = ", ".join(f"{len(found[name].found)} of {count} of {name}" for name, count in asked.items())
    return f"**Not all is answered yet**: {counts}."


def _what(workshop: Workshop, found: dict[str, Answers]) -> Iterable[str]:
    settings, base = workshop.settings, found["base"]
    if len(base.found) == 2:
        judge, drawn = base.one(what="judge"), base.one(what="base")
        yield (
            f"A FluxTransformer2DModel of {drawn['parameters'] / 1e6:.1f} M numbers (32 x 32 pixels in colour, 64 "
            f"tokens, {settings.steps} steps of FlowMatchEulerDiscreteScheduler) that draws ten {settings.contents} in "
            f"five colours: {drawn['content']:.1%} of {drawn['count']} pictures show the right one. The judge is a "
            f"network trained on drawn pictures: on others of those it tells {judge['content']:.1%} of the "
            f"{settings.contents} (in up to three styles at once) and {judge['styles']:.1%} of the styles."
        )
    person = "A person is a shape that the base does not know. " if PERSON in settings.groups else ""
    yield (
        "LoRAs of rank 8 (dotted, sepia) and 16, trained with PEFT: apart from each other, or going on from one "
        f"LoRA of the house style (a frame), at rank 16. {person}**Both** is "
        "the share of pictures that show the right content and all styles that were mixed. Scales are the same for "
        f"both LoRAs; the best of {', '.join(f'{s:g}' for s in settings.scales)} is found on other noise and "
        f"{settings.screened} of the pairs. Differences from the plain sum (diffusers' `set_adapters`), at each way's "
        "own best scale, have two 95 % intervals: over pictures of the same noise, and over pairs of LoRAs, which is "
        "the wider. Distance is that to the nearest of 24 drawn pictures of the prompt in both styles; diversity that "
        "between two pictures of one prompt."
    )


def claims(workshop: Workshop, found: dict[str, Answers]) -> list[Claim]:
    listed = []
    if len(found["base"].found) == 2:
        listed.append(Claim("contents of the base", 100 * found["base"].one(what="base")["content"], 97))
    alone = [a for _, a in found[LORAS.name]]
    if alone:
        listed.append(Claim("contents of the worst LoRA alone", 100 * min(a["content"] for a in alone), 95))
        listed.append(Claim("style of the worst LoRA alone", 100 * min(a["style"] for a in alone), 95))
    for group, title in GROUPS.items():
        of = cells(found, group, BEST)
        if PLAIN in of and DEFAULT in of:
            apart = of[DEFAULT].minus(of[PLAIN])
            text = f"{title}: the default above the plain sum, both at their best scales, lower end of the interval"
            listed.append(Claim(text, 100 * (apart.mean - apart.pictures), 0.1))
    return listed


def _group(found: dict[str, Answers], group: str) -> Iterable[str]:
    best, one = cells(found, group, BEST), cells(found, group, ONE)
    if PLAIN not in best:
        return
    yield f"## {GROUPS[group]}"
    rows = []
    for way in ranked(best):
        cell, apart = best[way], best[way].minus(best[PLAIN])
        difference = (
            "" if way == PLAIN else f"{100 * apart.mean:+.1f} ± {100 * apart.pictures:.1f} / {100 * apart.pairs:.1f}"
        )
        rows.append(
            [way, f"{cell.scale:g}", *_shares(cell), difference, *_lengths(cell), _at_one(one, way), cell.count]
        )
    for way in one:
        if way not in best:
            cell = one[way]
            rows.append([way, "1", *_shares(cell), "", *_lengths(cell), _at_one(one, way), cell.count])
    heads = [
        "way",
        "scale",
        "both",
        "content",
        "styles",
        "both, less plain sum's",
        "distance",
        "diversity",
        "both at 1",
        "pictures",
    ]
    yield table(heads, rows)


def _shares(cell: Cell) -> list[str]:
    return [f"{100 * cell.mean(name):.1f}" for name in ("both", "content", "styles")]


def _lengths(cell: Cell) -> list[str]:
    return [f"{cell.mean(name):.3f}" for name in ("distance", "apart")]


def _at_one(one: dict[str, Cell], way: str) -> str:
    return f"{100 * one[way].mean('both'):.1f}" if way in one else ""


def _alone(found: dict[str, Answers]) -> Iterable[str]:
    answers = list(found[LORAS.name])
    if answers:
        yield "## The LoRAs alone"
        rows = [
            [q["style"], q["family"], q["seed"], f"{100 * a['content']:.0f}", f"{100 * a['style']:.0f}"]
            for q, a in answers
        ]
        yield table(["LoRA", "family", "seed", "content right", "its style there"], rows)


def _cost(found: dict[str, Answers]) -> str:
    def minutes(answers: Iterable[tuple[Any, Answer]]) -> float:
        return sum(a["processor_seconds"] for _, a in answers) / 60

    parts = ", ".join(f"{name} {minutes(answers):.0f}" for name, answers in found.items())
    return f"Processor minutes of what is answered (models that another run had trained not counted): {parts}."
