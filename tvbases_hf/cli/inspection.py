"""What an inspection tells: lengths, similarities, bases, layers and bounds, as tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..sheet import Sheet, pairs_by
from .interference import in_cluster_order, print_interference
from .tables import count_of

if TYPE_CHECKING:
    from ..theory.bounds import Bounds, Side

# So many pairs of tasks are listed, of the most similar and of the least.
PAIRS = 10
TITLES = {
    ("3.5", "tasks"): "addition, all task vectors (Theorem 3.5): loss above the task's own model",
    ("3.5", "bases"): "addition, bases (Theorem 3.5)",
    ("3.6", "tasks"): "unseen task, most similar task vector (Theorem 3.6): loss above the task's own model",
    ("3.6", "bases"): "unseen task, basis of the other tasks (Theorem 3.6)",
    ("3.7", "tasks"): "negation of the worst other task (Theorem 3.7): loss above the base's",
    ("B.10", "bases"): "negation over bases, with their own error (Theorem B.10)",
    ("3.7", "bases"): "negation over bases, with the spectral tail (Theorem 3.7)",
}


def print_inspection(found: dict[str, Any], console: Console) -> None:
    given, found = found["tasks"], in_cluster_order(found)
    tasks = found["tasks"]
    vectors = count_of(len(tasks), "task vector", "task vectors")
    console.print(f"{vectors} of {found['parameters']:,} parameters in {found['tensors']} tensors")
    console.print(f"over {found['base']}\n", soft_wrap=True)
    lengths = Sheet(
        "task",
        "norm",
        "of the base's norm",
        title="length: the Frobenius norm of each task vector",
        about="How far each fine-tune is from the base. A task vector that is much longer than the others outweighs "
        "them in a sum.",
    )
    for row, task in enumerate(tasks):
        ratio = "-" if found["norm_ratio"] is None else f"{found['norm_ratio'][row]:.2%}"
        lengths.add_row(task, f"{found['norm'][row]:.4g}", ratio)
    console.print(lengths)
    print_similarities(tasks, found["cosine"], console)
    print_losses(found, console)
    if "layers" in found:
        print_layers(found["layers"], given, console)


def print_similarities(tasks: Sequence[str], cosine: Sequence[Sequence[float]], console: Console) -> None:
    """The matrix of cosines where it fits, else the pairs of the highest and of the lowest ones."""
    about = (
        "1 where two task vectors point the same way, 0 where they share nothing, below 0 where they work against each "
        "other. Fine-tunes that are much alike can share basis vectors."
    )
    matrix = Sheet("task", *tasks, title="cosine similarity of the task vectors", about=about)
    for task, row in zip(tasks, cosine, strict=True):
        matrix.add_row(task, *(f"{value:.2f}" for value in row))
    if matrix.fits(console.width) or len(tasks) < 3:
        console.print(matrix)
        return
    pairs = pairs_by(cosine)
    ends = [("most", pairs[:PAIRS]), ("least", pairs[: -PAIRS - 1 : -1])]
    if len(pairs) <= 2 * PAIRS:
        ends = [("most", pairs)]
    for which, chosen in ends:
        table = Sheet("task", "and", "cosine", names=2, about=about)
        table.title = f"cosine similarity: the {len(chosen)} {which} similar of {len(pairs)} pairs"
        for i, j in chosen:
            table.add_row(tasks[i], tasks[j], f"{cosine[i][j]:.2f}")
        console.print(table)


def print_losses(found: dict[str, Any], console: Console) -> None:
    unexplained, suggested, count = found["unexplained"], found["suggested_num_bases"], len(found["tasks"])
    losses = Sheet(
        "bases",
        "any vectors",
        "balanced bases",
        title="energy (squared norm) of the task vectors that so few vectors cannot restore",
        about="What single tasks lose when they are restored. The sum of all tasks loses nothing over balanced bases, "
        "however few. No vectors at all can lose less than the first column.",
    )
    pairs = zip(unexplained["any_vectors"], unexplained["balanced_bases"], strict=True)
    for m, (least, balanced) in enumerate(pairs, 1):
        losses.add_row(str(m), f"{least:.1%}", f"{balanced:.1%}")
    console.print(losses)
    if suggested == count and count > 1:
        console.print(
            f"suggested: {'both' if count == 2 else f'all {count}'} of them. Fewer would lose too much of the single "
            "tasks, so compressing will not help here; their sum can still be had from fewer"
        )
    else:
        lost = unexplained["balanced_bases"][suggested - 1]
        console.print(
            f"suggested: {count_of(suggested, 'basis, which loses', 'bases, which lose')} {lost:.1%} "
            f"(--num-bases {suggested})"
        )


def print_layers(layers: dict[str, Any], tasks: Sequence[str], console: Console) -> None:
    print_interference(layers, console)
    shared = Sheet(
        "task",
        "and",
        "shared energy",
        "by chance",
        names=2,
        title="share of two tasks' energy (squared norm) that lies in directions they share",
        about="What random directions of the same number would share stands beside it.",
    )
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    for (i, j), pair, value in zip(pairs, layers["shared"], layers["shared"].values(), strict=True):
        shared.add_row(tasks[i], tasks[j], f"{value:.1%}", f"{layers['chance'][pair]:.1%}")
    console.print(shared)


def print_bounds(found: Bounds, console: Console) -> None:
    """What was measured beside what may be at most, and which assumptions are not true."""
    c = found.constants
    console.print(
        f"\nC = {c.c:.4g} (largest squared norm), eps = {c.epsilon:.3f} (largest |cosine|), M = {found.num_bases}: "
        f"spectral gap {c.gap:.3g}, tail {c.tail:.3g}\n"
    )
    table = Sheet("task", "L", "gradient", "loss", "loss of base", title="at each task's own model")
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
            console.print(_bounds_table(title, sides))
    broken = sorted({reason for side in found.sides for reason in side.broken})
    if broken:
        console.print("not true here:")
        for reason in broken:
            console.print(f"  {reason}")
    console.print(_marks_explained(bool(broken)))


def _bounds_table(title: str, sides: list[Side]) -> Sheet:
    table = Sheet("loss of", "with", "measured", "bound", "", "not true", title=title, names=2)
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
