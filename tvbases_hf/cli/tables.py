"""What commands tell their users: plain dictionaries for programs, tables for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..bases import ae_bases
from ..basis import Basis
from ..basis.adapters.verdict import verdict
from ..basis.info import AdapterInfo, BasisInfo
from ..models.gram import Gram
from ..models.vectors import Vectors
from ..storage.output import readable_size

# Bases that leave less than this of the task vectors' energy unexplained are suggested.
SUGGESTED_LOSS = 0.2


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def inspection(vectors: Vectors, gram: Gram) -> dict[str, Any]:
    """Norms, similarities and the least loss for every M. Losses are shares of the total squared norm."""
    total = float(gram.matrix.trace()) or 1.0
    solutions = [ae_bases(gram.matrix, m) for m in range(1, len(vectors) + 1)]
    balanced = [s.bound / total for s in solutions]
    return {
        "base": vectors.base.label,
        "tasks": list(vectors.tasks),
        "parameters": vectors.numel,
        "tensors": len(vectors.names),
        "norm": gram.norms.tolist(),
        "norm_ratio": None if gram.norm_ratios is None else gram.norm_ratios.tolist(),
        "cosine": gram.cosine.tolist(),
        "unexplained": {"any_vectors": [s.spectral_bound / total for s in solutions], "balanced_bases": balanced},
        "suggested_num_bases": next(
            m for m, loss in enumerate(balanced, 1) if loss <= SUGGESTED_LOSS or m == len(vectors)
        ),
        "warnings": [*vectors.coverage.notes(), *gram.warnings()],
    }


def print_inspection(found: dict[str, Any], console: Console) -> None:
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
    table = Table("layers", "interference (STI)", title="singular task interference", title_justify="left")
    for group, value in layers["interference"].items():
        table.add_row(group, f"{value:.4g}")
    console.print(table)
    shared = Table("pair", "shared energy", "by chance", title="shared subspaces of pairs", title_justify="left")
    for pair, value in layers["shared"].items():
        shared.add_row(pair, f"{value:.1%}", f"{layers['chance'][pair]:.1%}")
    console.print(shared)


def print_components(found: dict[str, Any], console: Console) -> None:
    title = "share of each task vector's energy that is shared"
    table = Table("layers", *found["tasks"], title=title, title_justify="left")
    for group, shares in found["shared_energy"].items():
        table.add_row(group, *(f"{share:.1%}" for share in shares))
    console.print(table)


def compression(basis: Basis, vectors: Vectors, gram: Gram, out: Path) -> dict[str, Any]:
    """What was kept and what it cost, for a basis as it is stored."""
    info = basis.info
    stored = sum(tensor.nbytes for tensor in basis.tensors.values())
    return {
        "out": str(out),
        "method": info.method,
        "tasks": list(info.tasks),
        "num_bases": info.num_bases,
        "loss": info.loss,
        "bound": info.bound,
        "spectral_bound": info.spectral_bound,
        "effective_weights": info.effective_weights,
        "task_error": info.task_error,
        "norm_ratio": None if gram.norm_ratios is None else gram.norm_ratios.tolist(),
        "bytes": stored,
        "bytes_of_task_vectors": sum(vectors.base.tensors[name].nbytes for name in vectors.names) * len(vectors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in basis.tensors.values()}),
        **(adapter_compression(info.adapters, info) if info.adapters else {}),
    }


def adapter_compression(adapters: AdapterInfo, info: BasisInfo) -> dict[str, Any]:
    """What only a basis of adapters has to say; ``bytes_of_task_vectors`` is then that of the adapters."""
    return {
        "bytes_of_task_vectors": adapters.adapters_bytes,
        "alpha": adapters.alpha,
        "error_before_rounding": adapters.error_before_rounding,
        "truncation_error": adapters.truncation_error,
        "candidates": adapters.candidates,
        "stock_error": adapters.stock_error,
        "overlap": adapters.overlap,
        "verdict": verdict(info),
    }


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
