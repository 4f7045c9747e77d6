"""The demo's table: methods side by side, tasks below each other, so that it fits a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .compare import Result

HEADERS = {
    "base": "base",
    "finetuned": "fine-\ntuned",
    "task_arithmetic": "task\narithm.",
    "ae_bases": "ae_bases",
    "ae_bases_paper": "paper's\nAE",
    "rand_select": "Rand-\nSelect",
    "pca_bases": "PCA",
}


def print_results(results: Mapping[str, Result], tasks: Sequence[str], console: Console) -> None:
    table = Table(title="\naccuracy in per cent", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    for key in results:
        style = "bold" if key == "ae_bases" else None
        table.add_column(HEADERS[key], justify="right", no_wrap=True, style=style, header_style=style)
    for index, task in enumerate(tasks):
        table.add_row(task, *(f"{result.tasks[index]:.1f}" for result in results.values()))
    table.add_section()
    table.add_row("mean", *(f"{result.mean:.1f}" for result in results.values()), style="bold")
    table.add_row("spread", *(f"± {r.spread:.1f}" if len(r.accuracy) > 1 else "" for r in results.values()))
    table.add_row("vectors kept", *(str(result.vectors) for result in results.values()))
    table.add_row("alpha", *(span(result.alpha) for result in results.values()))
    console.print(table)
    counts = [f"{results[key].title}: {len(results[key].accuracy)} runs" for key in results if results[key].spread]
    console.print(f"spread: standard deviation over runs ({'; '.join(counts)})", style="dim")


def span(values: Sequence[float]) -> str:
    """0.3, or 0.25-0.4 when candidates differ."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
