"""The bounds for people: constants, curvatures, and both sides of every theorem."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..theory.bounds import Bounds, Side

TITLES = {
    ("3.5", "tasks"): "addition, all task vectors (Theorem 3.5): loss above the task's own model",
    ("3.5", "bases"): "addition, bases (Theorem 3.5)",
    ("3.6", "tasks"): "unseen task, most similar task vector (Theorem 3.6): loss above the task's own model",
    ("3.6", "bases"): "unseen task, basis of the other tasks (Theorem 3.6)",
    ("3.7", "tasks"): "negation of the worst other task (Theorem 3.7): loss above the base's",
    ("B.10", "bases"): "negation over bases, with their own error (Theorem B.10)",
    ("3.7", "bases"): "negation over bases, with the spectral tail (Theorem 3.7)",
}


def print_bounds(found: Bounds, console: Console) -> None:
    """What was measured beside what may be at most, and which assumptions are not true."""
    c = found.constants
    console.print(
        f"\nC = {c.c:.4g} (largest squared norm), eps = {c.epsilon:.3f} (largest |cosine|), M = {found.num_bases}: "
        f"spectral gap {c.gap:.3g}, tail {c.tail:.3g}\n"
    )
    table = Table(
        "task", "L", "gradient", "loss", "loss of base", title="at each task's own model", title_justify="left"
    )
    for at in found.curvatures:
        known = "" if at.top.converged else f" (not converged: residual {at.top.residual:.0%})"
        sign = " (negative: not a minimum)" if at.top.value < 0 else ""
        table.add_row(
            at.task, f"{at.smoothness:.4g}{known}{sign}", f"{at.gradient:.3g}", f"{at.loss:.4g}", f"{at.base_loss:.4g}"
        )
    console.print(table)
    for key, title in TITLES.items():
        sides = [side for side in found.sides if (side.theorem, side.over) == key]
        if sides:
            console.print(_table(title, sides))
    broken = sorted({reason for side in found.sides for reason in side.broken})
    if broken:
        console.print("not true here:")
        for reason in broken:
            console.print(f"  {reason}")
    console.print(_marks_explained(bool(broken)))


def _table(title: str, sides: list[Side]) -> Table:
    table = Table("loss of", "with", "measured", "bound", "", "not true", title=title, title_justify="left")
    for side in sides:
        mark = "<=" if side.holds else "EXCEEDED"
        table.add_row(
            side.task,
            side.other,
            f"{side.measured:.4g}",
            f"{side.bound:.4g}",
            mark,
            ", ".join(map(_short, side.broken)),
        )
    return table


def _short(reason: str) -> str:
    """``B.2: the gradient ...`` as B.2."""
    return reason.partition(":")[0]


def _marks_explained(broken: bool) -> str:
    if broken:
        return "A bound is certain only where nothing is listed as not true; elsewhere it may hold or not."
    return "Every assumption is true at the models measured: the bounds are certain."
