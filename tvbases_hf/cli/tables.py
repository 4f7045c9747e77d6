"""What commands tell their users: reports, which are plain dictionaries, as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from ..sheet import Sheet
from ..storage.system import readable_size
from ..text import printable


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"warning: {printable(line)}", file=sys.stderr)


def print_components(found: dict[str, Any], console: Console) -> None:
    title = "share of each task vector's energy (squared norm) that is shared"
    about = "The rest is unique to the task. Parts that are shared by all add up in a sum of the tasks."
    table = Sheet("layers", *found["tasks"], title=title, about=about)
    for group, shares in found["shared_energy"].items():
        table.add_row(group, *(f"{share:.1%}" for share in shares))
    console.print(table)
    console.print(f"{found['out']}: unique/TASK for each task, and shared", highlight=False, soft_wrap=True)


def print_compression(found: dict[str, Any], console: Console) -> None:
    if "verdict" in found:
        print_adapter_compression(found, console)
        return
    if "clusters" in found:
        print_library(found, console)
        return
    headlines = {"tsv": _headline_truncated, "masks": _headline_masked}
    truncated = found["method"] in headlines
    console.print(headlines.get(found["method"], _headline)(found))
    columns = {} if found["norm_ratio"] is None else {"norm / base": [f"{ratio:.2%}" for ratio in found["norm_ratio"]]}
    if not truncated:
        columns["weight in the sum"] = [f"{weight:.3f}" for weight in found["effective_weights"]]
    columns["error of its reconstruction"] = [f"{error:.1%}" for error in found["task_error"]]
    table = Sheet("task", *columns)
    for row in zip(found["tasks"], *columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{found['out']}: {readable_size(found['bytes'])} in {', '.join(found['dtypes'])}; "
        f"the task vectors: {readable_size(found['bytes_of_task_vectors'])}",
        soft_wrap=True,
    )


def print_library(found: Mapping[str, Any], console: Console) -> None:
    tasks = count_of(len(found["tasks"]), "task", "tasks")
    clusters = count_of(found["clusters"], "cluster", "clusters")
    console.print(
        f"{found['out']}: {tasks} in {clusters}, {readable_size(found['bytes'])} "
        f"({found['share']:.1%} of the adapters), mean squared error {found['mean_square_error']:.2g}",
        soft_wrap=True,
    )


def print_adapter_compression(found: dict[str, Any], console: Console) -> None:
    console.print(" ".join(found["verdict"]))
    errors = ("error_before_rounding", "task_error", "truncation_error")
    table = Sheet("task", "weight in the sum", "error", "as stored", "truncated alone, same bytes")
    for index, task in enumerate(found["tasks"]):
        weight = found["alpha"] * found["effective_weights"][index]
        table.add_row(task, f"{weight:.3f}", *(f"{found[kind][index]:.1%}" for kind in errors))
    console.print(table)
    console.print(
        f"{found['out']}: {readable_size(found['bytes'])} in {', '.join(found['dtypes'])}, "
        f"{readable_size(found['bytes'] / len(found['tasks']))} a task; the adapters: "
        f"{readable_size(found['bytes_of_task_vectors'])} ({found['bytes'] / found['bytes_of_task_vectors']:.1%})",
        soft_wrap=True,
    )
    print_loading(found, console)


def _headline(found: dict[str, Any]) -> str:
    number = found["num_bases"]
    return (
        f"{count_of(number, 'basis', 'bases')} ({found['method']}) of {len(found['tasks'])} task vectors: "
        f"{found['loss']:.2%} of their energy unexplained; least possible {found['bound']:.2%} "
        f"(by any {count_of(number, 'vector', 'vectors')}: {found['spectral_bound']:.2%})"
    )


def _headline_truncated(found: dict[str, Any]) -> str:
    vectors = count_of(len(found["tasks"]), "task vector", "task vectors")
    return f"{vectors}, truncated: {found['loss']:.2%} of their energy cut off, the least possible at these ranks"


def _headline_masked(found: dict[str, Any]) -> str:
    vectors = count_of(len(found["tasks"]), "task vector", "task vectors")
    return f"{vectors}, each a mask over one vector: {found['loss']:.2%} of their energy differs"


def count_of(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def print_merge(found: dict[str, Any], console: Console) -> None:
    """What a merge changed and how exactly it is stored; the errors by layers where there are any."""
    from ..merging.card import ROUNDING, fidelity

    console.print(
        f"{found['method']}: {len(found['models'])} models over {found['base']}, {found['changed']} of "
        f"{found['tensors']} tensors change; {readable_size(found['bytes'])} in {found['out']}",
        soft_wrap=True,
    )
    console.print(fidelity(found))
    errors = found.get("error", {})
    if errors.get("all", 0.0) >= ROUNDING:
        table = Sheet("layers", "relative error of the change")
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
    table = Sheet("task", "modules", "rank", "error", "as stored", "saved", "left", "size", "of the model")
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
    count = count_of(len(found["tasks"]), "LoRA", "LoRAs")
    console.print(
        f"{found['out']}: {count} over {found['base']}, in {', '.join(dtypes)}", highlight=False, soft_wrap=True
    )
    print_loading(found, console)


def print_preview(found: Mapping[str, Any], console: Console) -> None:
    """What a dry run would have written."""
    parts = [] if found["tensors"] is None else [count_of(found["tensors"], "tensor", "tensors")]
    parts += [] if found["bytes"] is None else [readable_size(found["bytes"])]
    size = f"it would be {', '.join(parts)} in" if parts else "it would be written to"
    waiting = ", ".join(found.get("waiting", ()))
    known = f" that can be before other merges are made ({waiting})" if waiting else ""
    console.print(
        f"dry run: all is checked{known}, nothing is written; {size} {found['out']}", highlight=False, soft_wrap=True
    )


def print_plan(found: dict[str, Any], console: Console) -> None:
    """What a job will cost; see planning.Plan."""
    table = Sheet("", "", show_header=False, title=f"{found['job']} of {found['models']} models")
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
