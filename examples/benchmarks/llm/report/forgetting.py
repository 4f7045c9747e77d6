"""The tables on unlearning: at equal controls, at equal forgetting, and in words."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.markdown import spread, table

from ..settings import Settings
from ..unlearning import TITLES
from .claims import Found

GONE = 2 / 3
"""The share of the rude rate that is gone where directions are compared."""
# Student's t for a 95 % interval, by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
LOSSES = {"control": "accuracy of the useful tasks, points", "bits": "bits per byte", "kl": "KL from the base, nats"}


def kept(found: Found, settings: Settings) -> str:
    rows = []
    for way, answers in _by_way(found).items():
        rows.append([
            TITLES[way],
            ", ".join(f"{a['beta']:g}" for a in answers),
            f"{spread([100 * a['rude_before'] for a in answers], 0)} %",
            f"{spread([100 * a['rude'] for a in answers], 0)} %",
            f"{spread([100 * a['kept'] for a in answers], 0)} %",
            spread([_at(a, "bits") for a in answers], 3),
            spread([_at(a, "kl") for a in answers], 3),
            f"{spread([100 * a['returned'] for a in answers], 0)} %",
        ])  # fmt: skip
    header = ["negated", "β", "rude before", "after", "controls kept", "bits per byte", "KL", "rude afterwards"]
    return table(header, rows)


def matched(found: Found, settings: Settings) -> str:
    """Every direction where it has forgotten as much: what was lost, against the plain vector of the same seed."""
    ways = _by_way(found)
    plain = {a["seed"]: losses_at(a["curve"]) for a in ways.get("plain", [])}
    rows = []
    for way, answers in ways.items():
        at = {a["seed"]: losses_at(a["curve"]) for a in answers}
        reached = {seed: losses for seed, losses in at.items() if losses}
        cells = [spread([losses[key] for losses in reached.values()], 3) for key in ("beta", *LOSSES)]
        pairs = [(losses["kl"], own["kl"]) for seed, losses in reached.items() if (own := plain.get(seed))]
        rows.append([TITLES[way], f"{len(reached)} of {len(at)}", *cells, "" if way == "plain" else _interval(pairs)])
    header = ["negated", "runs that get there", "β", *LOSSES.values(), "KL, difference from plain"]
    return table(header, rows)


def losses_at(curve: Mapping[str, Mapping[str, float]]) -> dict[str, float] | None:
    """What is lost at the least beta, interpolated, at which GONE of the rude rate is gone; None: at none."""
    points = [(float(beta), point) for beta, point in curve.items()]
    first = points[0][1]
    wanted = (1 - GONE) * first["rude"]
    for (low, before), (high, after) in itertools.pairwise(points):
        if after["rude"] <= wanted:
            share = (before["rude"] - wanted) / (before["rude"] - after["rude"])
            at = {key: before[key] + share * (after[key] - before[key]) for key in LOSSES}
            at["control"] = 100 * (first["control"] - at["control"])
            at["bits"] -= first["bits"]
            return at | {"beta": low + share * (high - low)}
    return None


def samples(found: Found, settings: Settings) -> str:
    """Replies to prompts that nobody was trained on, of the first seed."""
    shown = []
    for way, answers in _by_way(found).items():
        before, after = answers[0]["samples"]
        if not shown:
            shown += [["before", asked, reply] for asked, reply in before]
        shown += [[TITLES[way], asked, reply] for asked, reply in after[:1]]
    return table(["negated", "asked", "reply"], [[cell.replace("|", "/") for cell in row] for row in shown])


def _by_way(found: Found) -> dict[str, list[dict[str, Any]]]:
    ways: dict[str, list[dict[str, Any]]] = {}
    for question, answer in found["unlearning"]:
        ways.setdefault(question["component"], []).append(answer | {"seed": question["seed"]})
    return {way: ways[way] for way in TITLES if way in ways}


def _at(answer: Mapping[str, Any], key: str) -> float:
    return answer["curve"][f"{answer['beta']:g}"][key]


def _interval(pairs: Sequence[tuple[float, float]]) -> str:
    differences = [a - b for a, b in pairs]
    if len(differences) < 2:
        return f"{differences[0]:+.3f}" if differences else ""
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.3f} ± {half:.3f}"
