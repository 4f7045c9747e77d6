"""What commands tell their users: reports, which are plain dictionaries, as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..storage.system import readable_size
from ..text import printable
from .interference import in_cluster_order, print_interference

if TYPE_CHECKING:
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


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"warning: {printable(line)}", file=sys.stderr)


def print_inspection(found: dict[str, Any], console: Console) -> None:
    found = in_cluster_order(found)
    tasks = found["tasks"]
    console.print(
        f"{len(tasks)} task vectors of {found['parameters']:,} parameters in {found['tensors']} tensors "
        f"over {found['base']}\n"
    )
    table = Table("task", "norm", "norm / base", *tasks, title="length and cosine similarity", title_justify="left")
    for row, task in enumerate(tasks):
        cosines = [f"{value:.2f}" for value in found["cosine"][row]]
        ratio = "-" if found["norm_ratio"] is None else f"{found['norm_ratio'][row]:.2%}"
        table.add_row(task, f"{found['norm'][row]:.4g}", ratio, *cosines)
    console.print(table)
    losses = Table("bases", "any vectors", "balanced", title="energy left unexplained", title_justify="left")
    unexplained = found["unexplained"]
    for m, (least, balanced) in enumerate(
        zip(unexplained["any_vectors"], unexplained["balanced_bases"], strict=True), 1
    ):
        mark = "  <- suggested" if m == found["suggested_num_bases"] else ""
        losses.add_row(str(m), f"{least:.1%}", f"{balanced:.1%}{mark}")
    console.print(losses)
    if "layers" in found:
        print_layers(found["layers"], console)


def print_layers(layers: dict[str, Any], console: Console) -> None:
    print_interference(layers, console)
    shared = Table("pair", "shared energy", "by chance", title="shared subspaces of pairs", title_justify="left")
    for pair, value in layers["shared"].items():
        shared.add_row(pair, f"{value:.1%}", f"{layers['chance'][pair]:.1%}")
    console.print(shared)


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
            console.print(_bounds_table(title, sides))
    broken = sorted({reason for side in found.sides for reason in side.broken})
    if broken:
        console.print("not true here:")
        for reason in broken:
            console.print(f"  {reason}")
    console.print(_marks_explained(bool(broken)))


def _bounds_table(title: str, sides: list[Side]) -> Table:
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


def print_components(found: dict[str, Any], console: Console) -> None:
    title = "share of each task vector's energy that is shared"
    table = Table("layers", *found["tasks"], title=title, title_justify="left")
    for group, shares in found["shared_energy"].items():
        table.add_row(group, *(f"{share:.1%}" for share in shares))
    console.print(table)


def print_compression(found: dict[str, Any], console: Console) -> None:
    if "verdict" in found:
        print_adapter_compression(found, console)
        return
    truncated = found["method"] == "tsv"
    console.print(_headline_truncated(found) if truncated else _headline(found))
    columns = {} if found["norm_ratio"] is None else {"norm / base": [f"{ratio:.2%}" for ratio in found["norm_ratio"]]}
    if not truncated:
        columns["weight in the sum"] = [f"{weight:.3f}" for weight in found["effective_weights"]]
    columns["error of its reconstruction"] = [f"{error:.1%}" for error in found["task_error"]]
    table = Table("task", *columns)
    for row in zip(found["tasks"], *columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{found['out']}: {readable_size(found['bytes'])} in {', '.join(found['dtypes'])}; "
        f"the task vectors: {readable_size(found['bytes_of_task_vectors'])}"
    )


def print_adapter_compression(found: dict[str, Any], console: Console) -> None:
    console.print(" ".join(found["verdict"]))
    errors = ("error_before_rounding", "task_error", "truncation_error")
    table = Table("task", "weight in the sum", "error", "as stored", "truncated alone, same bytes")
    for index, task in enumerate(found["tasks"]):
        weight = found["alpha"] * found["effective_weights"][index]
        table.add_row(task, f"{weight:.3f}", *(f"{found[kind][index]:.1%}" for kind in errors))
    console.print(table)
    console.print(
        f"{found['out']}: {readable_size(found['bytes'])} in {', '.join(found['dtypes'])}, "
        f"{readable_size(found['bytes'] / len(found['tasks']))} a task; the adapters: "
        f"{readable_size(found['bytes_of_task_vectors'])} ({found['bytes'] / found['bytes_of_task_vectors']:.1%})"
    )
    print_loading(found, console)


def _headline(found: dict[str, Any]) -> str:
    number = found["num_bases"]
    return (
        f"{_count(number, 'basis', 'bases')} ({found['method']}) of {len(found['tasks'])} task vectors: "
        f"{found['loss']:.2%} of their energy unexplained; least possible {found['bound']:.2%} "
        f"(by any {_count(number, 'vector', 'vectors')}: {found['spectral_bound']:.2%})"
    )


def _headline_truncated(found: dict[str, Any]) -> str:
    return (
        f"{_count(len(found['tasks']), 'task vector', 'task vectors')}, truncated: {found['loss']:.2%} of their energy "
        "cut off, the least possible at these ranks"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def print_merge(found: dict[str, Any], console: Console) -> None:
    """What a merge changed and how exactly it is stored; the errors by layers where there are any."""
    from ..merging.card import ROUNDING, fidelity

    console.print(
        f"{found['method']}: {len(found['models'])} models over {found['base']}, {found['changed']} of "
        f"{found['tensors']} tensors change; {readable_size(found['bytes'])} in {found['out']}\n{fidelity(found)}"
    )
    errors = found.get("error", {})
    if errors.get("all", 0.0) >= ROUNDING:
        table = Table("layers", "relative error of the change")
        for group, error in errors.items():
            table.add_row(group, f"{error:.3%}")
        console.print(table)
    print_loading(found, console)


def print_loading(found: Mapping[str, Any], console: Console) -> None:
    """What a user should know who loads the adapter that was written."""
    for note in found.get("loading", ()):
        console.print(f"to load it: {note}", highlight=False)


def print_extraction(found: dict[str, Any], console: Console) -> None:
    """By task: how much of the change is kept, in which ranks, what is saved beside it, what is left."""
    table = Table("task", "modules", "rank", "error", "as stored", "saved", "left", "size", "of the model")
    for task, kept in found["tasks"].items():
        ranks = list(kept["ranks"])
        table.add_row(
            task,
            str(sum(kept["ranks"].values())),
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            *(f"{kept[kind]:.3%}" for kind in ("error_before_rounding", "error")),
            str(len(kept["modules_to_save"]) + kept["biases"]),
            str(len(kept["left"])),
            readable_size(kept["bytes"]),
            f"{kept['bytes'] / kept['bytes_of_fine_tune']:.1%}",
        )
    console.print(table)
    dtypes = sorted({dtype for kept in found["tasks"].values() for dtype in kept["dtypes"]})
    count = _count(len(found["tasks"]), "LoRA", "LoRAs")
    console.print(f"{found['out']}: {count} over {found['base']}, in {', '.join(dtypes)}", highlight=False)
    print_loading(found, console)


def print_preview(found: Mapping[str, Any], console: Console) -> None:
    """What a dry run would have written."""
    parts = [] if found["tensors"] is None else [_count(found["tensors"], "tensor", "tensors")]
    parts += [] if found["bytes"] is None else [readable_size(found["bytes"])]
    size = f"it would be {', '.join(parts)} in" if parts else "it would be written to"
    waiting = ", ".join(found.get("waiting", ()))
    known = f" that can be before other merges are made ({waiting})" if waiting else ""
    console.print(f"dry run: all is checked{known}, nothing is written; {size} {found['out']}", highlight=False)


def print_plan(found: dict[str, Any], console: Console) -> None:
    """What a job will cost; see planning.Plan."""
    table = Table("", "", show_header=False, title=f"{found['job']} of {found['models']} models", title_justify="left")
    for label, value in (
        ("numbers in a model", f"{found['numbers']:,}"),
        ("read", readable_size(found["read"])),
        ("written", readable_size(found["written"])),
        ("peak memory of a process", f"about {readable_size(found['memory'])}"),
        ("arithmetic", f"{_billions(found['operations'])} billion operations"),
    ):
        table.add_row(label, value)
    if found["seconds"] is not None:
        rate = f"{readable_size(found['bandwidth'])}/s"
        table.add_row(f"reading and writing at {rate}", readable_time(found["seconds"]))
    if len(found["ranks"]) > 1:
        shares = [readable_size(size) for size in (min(found["ranks"]), max(found["ranks"]))]
        table.add_row(f"read by each of {len(found['ranks'])} processes", " to ".join(shares))
    console.print(table)


def _billions(count: float) -> str:
    return f"{count / 1e9:,.0f}" if count >= 1e12 else f"{count / 1e9:.3g}"


def readable_time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
