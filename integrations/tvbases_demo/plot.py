"""The demo's picture: how task vectors relate, what the bases are made of, what merging them keeps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from tvbases_hf.errors import MissingExtraError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingExtraError(f'matplotlib is missing ({error}); pip install "tvbases-hf[demo]"') from error

# 1600 x 900 pixels; text stays legible when a page shows them at half that width.
SIZE, DPI = (12.8, 7.2), 125
INK, FAINT = "#222222", "#8a8a8a"
# Okabe and Ito's palette, distinct also for colour-blind readers.
COLOURS = {
    "base": "#bbbbbb",
    "finetuned": "#555555",
    "task_arithmetic": "#56B4E9",
    "ae_bases": "#0072B2",
    "ae_bases_paper": "#009E73",
    "rand_select": "#E69F00",
    "pca_bases": "#CC79A7",
}
NAMES = {
    "base": "base, zero-shot",
    "finetuned": "one fine-tune per task",
    "task_arithmetic": "task arithmetic",
    "ae_bases": "ae_bases",
    "ae_bases_paper": "autoencoder, as in the paper",
    "rand_select": "RandSelect",
    "pca_bases": "PCA",
}
# Beside the bars of one task, in this order; the eye compares the neighbours.
PER_TASK = ("base", "pca_bases", "rand_select", "task_arithmetic", "ae_bases", "ae_bases_paper", "finetuned")


def draw(report: Mapping[str, Any]) -> bytes:
    """The report of `run_demo` as a PNG."""
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.02, hspace=0.05)  # type: ignore[union-attr]
    grid = figure.add_gridspec(2, 3, height_ratios=(1.12, 1), width_ratios=(1.0, 0.72, 1.2))
    draw_cosine(figure.add_subplot(grid[0, 0]), report["cosine"], report["tasks"])
    draw_encoder(figure.add_subplot(grid[0, 1]), report["encoder"], report["tasks"])
    draw_means(figure.add_subplot(grid[0, 2]), report)
    draw_tasks(figure.add_subplot(grid[1, :]), report)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    return drawn.getvalue()


def draw_cosine(axes: Axes, cosine: Sequence[Sequence[float]], tasks: Sequence[str]) -> None:
    """Cosine matrix; its diagonal is 1 and left grey, so that the colours show the rest."""
    count = len(tasks)
    limit = max([abs(cosine[i][j]) for i in range(count) for j in range(i)], default=1.0) or 1.0
    axes.imshow(cosine, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for i in range(count):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor="#e4e4e4"))
        for j in range(count):
            strong = i != j and abs(cosine[i][j]) > 0.6 * limit
            text = "1" if i == j else f"{cosine[i][j]:.2f}".replace("0.", ".").replace("-.00", ".00")
            axes.text(j, i, text, ha="center", va="center", fontsize=9.5, color="white" if strong else INK)
    label_heat_map(axes, "Cosine of the task vectors", tasks)
    axes.set_xticks(range(count), tasks, rotation=40, ha="right", rotation_mode="anchor")


def draw_encoder(axes: Axes, encoder: Sequence[Sequence[float]], tasks: Sequence[str]) -> None:
    """Encoder [T, M]: every column sums to 1, every row to M/T."""
    highest = max(max(row) for row in encoder)
    axes.imshow(encoder, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for i, row in enumerate(encoder):
        for j, value in enumerate(row):
            colour = "white" if value > 0.6 * highest else INK
            axes.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=9.5, color=colour)
    label_heat_map(axes, f"Encoder: {len(encoder[0])} bases of {len(tasks)} tasks", tasks)
    axes.set_xticks(range(len(encoder[0])), [f"basis {j + 1}" for j in range(len(encoder[0]))])


def label_heat_map(axes: Axes, title: str, tasks: Sequence[str]) -> None:
    heading(axes, title)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.tick_params(length=0, labelsize=10, labelcolor=INK)
    axes.spines[:].set_visible(False)


def draw_means(axes: Axes, report: Mapping[str, Any]) -> None:
    """Mean accuracy, one bar a method, with the number of vectors it keeps."""
    keys = [key for key in NAMES if key in report["accuracy"]]
    order = ["base", *sorted(keys[1:], key=lambda key: report["accuracy"][key])]
    for place, key in enumerate(order):
        value, spread = report["accuracy"][key], report["spread"][key]
        axes.barh(place, value, color=COLOURS[key], height=0.72)
        if spread:
            axes.plot([value - spread, value + spread], [place, place], color=INK, linewidth=1.6)
        kept = report["vectors"][key]
        inside = NAMES[key] + (f", {kept} vectors" if kept else "")
        dark = key in ("finetuned", "ae_bases", "ae_bases_paper")
        weight = "bold" if key == "ae_bases" else "normal"
        axes.text(1.5, place, inside, va="center", fontsize=10, color="white" if dark else INK, weight=weight)
        axes.text(value + spread + 1, place, f"{value:.1f}", va="center", fontsize=10.5, color=INK, weight=weight)
    heading(axes, "Mean accuracy, % (line: spread over runs)")
    axes.set_xlim(0, 108)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def draw_tasks(axes: Axes, report: Mapping[str, Any]) -> None:
    """Accuracy per task, grouped."""
    keys = [key for key in PER_TASK if key in report["per_task"]]
    tasks, width = report["tasks"], 0.88 / len(keys)
    for offset, key in enumerate(keys):
        places = [i + (offset - (len(keys) - 1) / 2) * width for i in range(len(tasks))]
        values = [report["per_task"][key][task] for task in tasks]
        axes.bar(places, values, width * 0.92, color=COLOURS[key], label=label(key, report))
    heading(axes, "Accuracy per task, % (in brackets: vectors kept)")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_xlim(-0.55, len(tasks) - 0.45)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e6e6")
    axes.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.legend(ncols=len(keys), loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False, fontsize=10,
                handlelength=1, handleheight=1, columnspacing=1.4, borderaxespad=0.2)  # fmt: skip


def label(key: str, report: Mapping[str, Any]) -> str:
    kept = report["vectors"][key]
    return f"{NAMES[key]} ({kept})" if key not in ("base", "finetuned") else NAMES[key]


def heading(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12.5, weight="bold", color=INK, pad=9)
