"""The figures of RESULTS-LLM.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..settings import Settings
from . import tables
from .claims import Found, own

# Okabe and Ito's palette, distinct also for colour-blind readers.
BLUE, GREEN, ORANGE, GREY = "#0072B2", "#009E73", "#E69F00", "#555555"


def draw(found: Found, settings: Settings, folder: Path) -> list[str]:
    """Write every figure that there are answers for and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: drawing for name, (needs, drawing) in FIGURES.items() if needs in found}
    for name, drawing in made.items():
        figure = Figure(figsize=(7.2, 4.6), dpi=130, facecolor="white", layout="constrained")
        drawing(figure.add_subplot(), found, settings)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    return list(made)


def draw_merges(axes: Any, found: Found, settings: Settings) -> None:
    """What merges gain on the tasks against what they cost on text."""
    for (x, y), titles in points(found).items():
        colour = ORANGE if titles[0].startswith("PEFT") else GREEN if " over " in titles[0] else BLUE
        axes.plot(x, y, "o", color=colour, markersize=5)
        axes.annotate("\n".join(titles), (x, y), textcoords="offset points", xytext=(5, -2), fontsize=5.5, va="top")
    base = found["finetune"].of(kind="base")
    if base:
        axes.plot(base[0]["abilities"]["bits"], base[0]["accuracy"], "k*", markersize=11)
        axes.axvline(base[0]["abilities"]["bits"], color="0.7", linestyle=":")
    tuned = own(found)
    if tuned is not None:
        axes.axhline(tuned, color=GREY, linestyle="--", linewidth=1)
        axes.text(axes.get_xlim()[1], tuned, "own adapters", fontsize=7, ha="right", va="bottom", color=GREY)
    axes.set(xlabel="bits per byte of text (the base: star, dotted)", ylabel="accuracy over the tasks, %")
    axes.set_title("One model for all tasks: gained and lost")
    axes.grid(alpha=0.3)


def points(found: Found) -> dict[tuple[float, float], list[str]]:
    """{(bits per byte, accuracy): the merges there}, of those whose alpha was chosen."""
    there: dict[tuple[float, float], list[str]] = {}
    for title, answers in tables.merged_rows(found).items():
        known = [a for a in answers if "abilities" in a and a["curve"]]
        if known:
            x = statistics.mean(a["abilities"]["bits"] for a in known)
            y = statistics.mean(a["accuracy"] for a in known)
            there.setdefault((round(x, 3), round(y, 1)), []).append(title)
    return there


def draw_bytes(axes: Any, found: Found, settings: Settings) -> None:
    for method, colour, title in (("chosen", BLUE, "best basis"), ("tsv", ORANGE, "each truncated alone")):
        points = sorted((a["share"], a["accuracy"]) for q, a in found["budgets"] if q["method"] == method)
        axes.plot([s for s, _ in points], [a for _, a in points], "o-", color=colour, label=title)
    tuned = own(found)
    if tuned is not None:
        axes.axhline(tuned, color=GREY, linestyle="--", linewidth=1, label="own adapters")
    axes.set(xlabel="share of the adapters' bytes", ylabel="own accuracy, %", title="Accuracy against bytes")
    axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


# {file: (the study that it shows, how)}
FIGURES: dict[str, tuple[str, Callable[[Any, Found, Settings], None]]] = {
    "llm_merges": ("addition", draw_merges),
    "llm_bytes": ("budgets", draw_bytes),
}
