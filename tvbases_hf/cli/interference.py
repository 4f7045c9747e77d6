"""What an inspection says of interference: whose spaces overlap, and singular task interference by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from ..sheet import Sheet, shortened
from ..text import in_picture

COLUMNS = {
    "leading": "leading components",
    "whole": "whole spectra (eq. 7)",
    "sum": "sum, own directions",
    "merged": "merged, own directions",
}
# Okabe and Ito's palette, distinct also for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# A name beside a matrix has room for so many letters.
NAME = 18
SIDES = {"left": "U^T U", "right": "V^T V"}


def in_cluster_order(found: Mapping[str, Any]) -> dict[str, Any]:
    """An inspection with its tasks in the order that puts similar ones side by side."""
    order = found.get("order", list(range(len(found["tasks"]))))
    moved = {key: [found[key][i] for i in order] for key in ("tasks", "norm", "norm_ratio") if found[key]}
    return {**found, **moved, "cosine": _moved(found["cosine"], order)}


def print_interference(layers: Mapping[str, Any], console: Console) -> None:
    """STI of every group of layers; of a merge also what it does in the tasks' own leading directions."""
    groups = layers["singular"]["groups"]
    kinds = [kind for kind in COLUMNS if any(kind in group for group in groups.values())]
    table = Sheet(
        "layers",
        *(COLUMNS[kind] for kind in kinds),
        title="singular task interference (STI)",
        about="How much the leading singular directions of the tasks overlap in these layers: 0 where they stay out of "
        "each other's way, more where a plain sum mixes them up.",
    )
    for group, values in groups.items():
        table.add_row(group, *(f"{values[kind]:.4g}" for kind in kinds))
    console.print(table)


def named(tasks: Sequence[str]) -> list[str]:
    """Names for which there is room beside a matrix."""
    return [in_picture(name) for name in shortened(tasks, NAME)]


def draw_overlaps(axes: Sequence[Any], found: Mapping[str, Any]) -> None:
    """U^T U and V^T V: how far the tasks' leading singular spaces overlap."""
    tasks = named([found["tasks"][i] for i in found["order"]])
    singular = found["layers"]["singular"]
    for axis, (side, title) in zip(axes, SIDES.items(), strict=True):
        if side not in singular["overlap"]:  # no matrix is large enough
            axis.set_axis_off()
            continue
        image = axis.imshow(_moved(singular["overlap"][side], found["order"]), vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(tasks)), tasks)
        axis.figure.colorbar(image, ax=axis, shrink=0.8, label="overlap of the leading spaces")
        axis.set_title(f"{title}: whose singular spaces overlap (by chance {singular['chance'][side]:.2f})")


def draw_interference(axis: Any, layers: Mapping[str, Any]) -> None:
    """STI by layer: of the leading components; of a merge and the plain sum in each task's own directions."""
    groups = layers["singular"]["groups"]
    merged = any("merged" in group for group in groups.values())
    kinds = ("sum", "merged") if merged else ("leading",)
    width = 0.8 / len(kinds)
    for place, kind in enumerate(kinds):
        offsets = [index + (place - (len(kinds) - 1) / 2) * width for index in range(len(groups))]
        axis.bar(offsets, [group[kind] for group in groups.values()], width, color=COLOURS[place], label=COLUMNS[kind])
    names = list(groups)
    shown = range(0, len(names), max(1, len(names) // 16))  # as many names as there is room for
    axis.set_xticks(shown, [in_picture(names[i]) for i in shown], rotation=45, ha="right", rotation_mode="anchor")
    axis.set(ylabel="singular task interference (no unit)", title="Where the tasks get in each other's way")
    axis.legend(fontsize="small")


def _moved(matrix: Sequence[Sequence[float]], order: Sequence[int]) -> list[list[float]]:
    return [[matrix[row][column] for column in order] for row in order]
