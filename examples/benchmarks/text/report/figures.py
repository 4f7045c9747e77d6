"""The figures of RESULTS.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evidence.runner import Answers
from matplotlib.figure import Figure

from .. import addition, negation
from ..kinds import ALL, TITLES
from ..settings import Settings
from .addition import accuracy_by_size, rows_of

Found = Mapping[str, Answers]
# Okabe and Ito's palette, distinct also for colour-blind readers.
COLOURS = {
    ALL: "#555555",
    "balanced": "#0072B2",
    "ae_adam": "#009E73",
    "normalize": "#56B4E9",
    "rand_select": "#E69F00",
    "pca": "#CC79A7",
    "true": "#555555",
    "random_span": "#D55E00",
    "even": "#F0E442",
    "rand_proj": "#bbbbbb",
}


def draw(found: Found, settings: Settings, folder: Path) -> list[str]:
    """Write every figure and return the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: drawing for name, (needs, drawing) in FIGURES.items() if needs <= set(found)}
    for name, drawing in made.items():
        figure = Figure(figsize=(7.2, 4.2), dpi=130, facecolor="white", layout="constrained")
        drawing(figure.add_subplot(), found, settings)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    return [f"{name}.png" for name in made]


def draw_addition(axes: Any, found: Found, settings: Settings) -> None:
    """One group of dots per method: what is kept of accuracy by how many vectors."""
    rows = rows_of(settings)
    markers = {"task_arithmetic": "o", "ties": "s", "tsv": "D"}
    for place, (kind, m) in enumerate(reversed(rows)):
        for method, marker in markers.items():
            cells = found["addition"].of(method=method, kind=kind, num_bases=m, over="bases")
            values = [a["accuracy"] for a in cells]
            offset = {"o": 0.18, "s": 0.0, "D": -0.18}[marker]
            axes.errorbar(
                statistics.mean(values),
                place + offset,
                xerr=statistics.stdev(values) if len(values) > 1 else 0,
                fmt=marker,
                color=COLOURS[kind],
                markersize=5,
                label=addition.METHODS[method] if kind == ALL else None,
            )
    axes.set_yticks(range(len(rows)), [f"{TITLES[kind]}, M = {m}" for kind, m in reversed(rows)])
    axes.set(xlabel="accuracy over the tasks, %", title="One model for all tasks, from fewer vectors")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")


def draw_sizes(axes: Any, found: Found, settings: Settings) -> None:
    points = accuracy_by_size(found, settings)
    for kind, by_m in points.items():
        axes.plot(list(by_m), list(by_m.values()), "o-", color=COLOURS[kind], label=TITLES[kind])
    zero = statistics.mean(a["zero_shot"] for q, a in found["finetune"] if q["task"] in settings.tasks)
    axes.axhline(zero, color="0.6", linestyle=":", label="zero-shot")
    axes.set(xlabel="vectors kept, M", ylabel="accuracy, %", title="Task arithmetic over M vectors")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_negation(axes: Any, found: Found, settings: Settings) -> None:
    asked = {question["kind"] for question, _ in found["negation"]}
    for kind, title in negation.TITLES.items():
        if kind not in asked:
            continue
        cell = found["negation"].of(kind=kind)
        target, control = (statistics.mean(a[key] for a in cell) for key in ("target", "control"))
        axes.plot(target, control, "o", color=COLOURS.get(kind, "#009E73"), markersize=8, label=title)
    before = found["negation"].of(kind="true")
    target, control = (statistics.mean(a[f"{key}_before"] for a in before) for key in ("target", "control"))
    axes.plot(target, control, "*", color="k", markersize=12, label="before")
    axes.set(
        xlabel="target accuracy, % (lower: more forgotten)",
        ylabel="control accuracy, %",
        title=f"Forgetting one task, M = {settings.half}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def draw_bytes(axes: Any, found: Found, settings: Settings) -> None:
    """Every task's own accuracy against the bytes kept: TSV-Compress of full fine-tunes, bases of LoRAs."""
    whole = [a["own"] for q, a in found["finetune"] if q["kind"] == "full" and q["seed"] == settings.seeds[0]
             and q["task"] in settings.tasks]  # fmt: skip
    kept = sorted((a["share"], a["accuracy"]) for _, a in found["compression"])
    axes.plot([s for s, _ in kept] + [1.0], [a for _, a in kept] + [statistics.mean(whole)], "o-", color="#0072B2",
              label="TSV-C of full fine-tunes")  # fmt: skip
    for method, colour in (("chosen", "#009E73"), ("tsv", "#E69F00")):
        answers = found["adapters"]
        cells = [a for q, a in answers if q["kind"] == "lora" and q["method"] in (method, "none")]
        pairs = sorted((a["share"], a["own"]) for a in cells)
        label = "LoRA, best basis" if method == "chosen" else "LoRA, each truncated"
        axes.plot([s for s, _ in pairs], [a for _, a in pairs], "s-", color=colour, label=label)
    axes.set(xlabel="share of the bytes kept", ylabel="own accuracy, %", title="Accuracy against bytes", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


# {file: (the studies that it shows, how)}
FIGURES: dict[str, tuple[set[str], Callable[[Any, Found, Settings], None]]] = {
    "addition": ({"addition"}, draw_addition),
    "sizes": ({"addition", "sizes"}, draw_sizes),
    "negation": ({"negation"}, draw_negation),
    "bytes": ({"compression", "adapters"}, draw_bytes),
}
