"""How time and memory grow: against tasks, sides of a matrix, bases, ranks and tensors, beside what the theory says.

    python examples/benchmarks/bench_scaling.py [--quick] [--json FILE]

Every line is one operation at sizes that double. The exponent is fitted to the logarithms of the processor seconds of
the larger half of the sizes, as the smaller ones show what a call costs; the theory is that of the operations counted
in the docstrings. Memory is what is allocated at most while the operation runs (Linux only; blank elsewhere).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_layers import make_tasks
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from tvbases_hf import Vectors, ae_bases, decompose, gram_matrix
from tvbases_hf.algebra.delta import Delta, Dense, LowRank
from tvbases_hf.algebra.products import gram
from tvbases_hf.methods.devec import Options
from tvbases_hf.methods.iso import iso_c
from tvbases_hf.methods.tsv import tsv_merge

Work = Callable[[], Any]


@dataclass(frozen=True)
class Series:
    """``prepared(size)`` makes the inputs and returns the work; ``theory`` is the exponent of its operations."""

    title: str
    variable: str
    sizes: tuple[int, ...]
    theory: float
    prepared: Callable[[int], Work]


def changes(count: int, side: int) -> list[Delta]:
    return [Dense(task) for task in make_tasks(count, side, side, "cpu")]


def factors(count: int, side: int, rank: int) -> list[Delta]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [LowRank(numbers(side, rank), numbers(rank, side)) for _ in range(count)]


def tall(rows: int, columns: int) -> list[Delta]:
    """Four fine-tunes of an embedding in bfloat16; large ones are merged by their rows."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=generator).mul_(0.02)
    tuned = (torch.randn(rows, columns, generator=generator).mul_(1e-3).add_(base) for _ in range(4))
    stored = base.to(torch.bfloat16)
    return [Dense(model.to(torch.bfloat16), stored) for model in tuned]


def products(count: int) -> Tensor:
    """The Gram matrix of so many vectors that overlap."""
    vectors = torch.randn(4 * count, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors += 0.5 * vectors[:, :1]
    return vectors.T @ vectors


def of_changes(operation: Callable[[list[Delta]], Any], made: Callable[[int], list[Delta]]) -> Callable[[int], Work]:
    def prepared(size: int) -> Work:
        deltas = made(size)
        return lambda: operation(deltas)

    return prepared


def of_files(root: Path, numbers: int) -> Callable[[int], Work]:
    """The Gram matrix of two fine-tunes of one size in so many tensors."""

    def prepared(count: int) -> Work:
        shape = (numbers // count // 64, 64)
        for model in range(3):
            generator = torch.Generator().manual_seed(model)
            state = {f"layers.{k}.weight": torch.randn(shape, generator=generator) for k in range(count)}
            directory = root / f"{count}-{model}"
            directory.mkdir()
            save_file(state, directory / "model.safetensors", {"format": "pt"})
        return lambda: gram_matrix(Vectors.open(root / f"{count}-0", {k: root / f"{count}-{k}" for k in "12"}))

    return prepared


def series(root: Path, quick: bool) -> list[Series]:
    small = 5 if quick else 0  # so many doublings fewer

    def sizes(first: int, last: int) -> tuple[int, ...]:
        found = tuple(2**k for k in range(int(math.log2(first)), int(math.log2(last)) + 1))
        return found[: max(2, len(found) - small)]

    side, tasks, rank, least = (64, 4, 4, 64) if quick else (1024, 4, 16, 512)

    def of_bases(size: int) -> Work:
        table = products(16 if quick else 64)
        return lambda: ae_bases(table, size)

    def of_tasks(size: int) -> Work:
        table = products(size)
        return lambda: ae_bases(table, size // 2)

    square = lambda n: changes(tasks, n)  # noqa: E731
    tsv = lambda deltas: tsv_merge(deltas)  # noqa: E731
    split = lambda deltas: decompose(deltas, Options(rank=1 / len(deltas)))  # noqa: E731
    flat = lambda deltas: iso_c(deltas, [1.0] * len(deltas))  # noqa: E731
    return [
        Series("Gram matrix, dense", "T", sizes(2, 64), 2, of_changes(gram, lambda n: changes(n, side))),
        Series("Gram matrix, factors", "T", sizes(2, 64), 2, of_changes(gram, lambda n: factors(n, side, rank))),
        Series("balanced bases, M = T / 2", "T", sizes(4, 64), 3, of_tasks),
        Series("balanced bases", "M", sizes(2, 32), 1, of_bases),
        Series("TSV-Merge", "n", sizes(least, 8 * least), 3, of_changes(tsv, square)),
        Series("TSV-Merge", "T", sizes(2, 32), 1, of_changes(tsv, lambda n: changes(n, side))),
        Series("TSV-Merge, embedding", "rows", sizes(1 << 14, 1 << 17), 1, of_changes(tsv, lambda n: tall(n, side))),
        Series("TSV-Merge, factors", "r", sizes(8, 64), 2, of_changes(tsv, lambda n: factors(tasks, side, n))),
        Series("DeVec", "n", sizes(least, 4 * least), 3, of_changes(split, square)),
        Series("Iso-C", "n", sizes(least, 8 * least), 3, of_changes(flat, square)),
        Series("Gram matrix of files", "tensors", sizes(16, 4096), 0, of_files(root, 1 << (16 if quick else 24))),
    ]


def measured(work: Work) -> dict[str, float | None]:
    """Processor seconds of all cores, and the megabytes that are allocated beside those before."""
    before, most, stop = allocated(), [0.0], threading.Event()

    def watch() -> None:
        while before is not None and not stop.wait(0.005):
            most[0] = max(most[0], (allocated() or 0.0) - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.process_time()
    work()
    seconds = time.process_time() - began
    stop.set()
    watcher.join()
    return {"seconds": seconds, "megabytes": None if before is None else most[0]}


def allocated() -> float | None:
    """Anonymous memory of this process, megabytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), None)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the larger half of the points in logarithms, by least squares."""
    last = max(2, (len(sizes) + 1) // 2)
    points = torch.tensor([sizes[-last:], [max(1e-6, s) for s in seconds[-last:]]], dtype=torch.float64).log()
    x, y = points - points.mean(dim=1, keepdim=True)
    return float((x @ y) / (x @ x))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    report = []
    with tempfile.TemporaryDirectory() as directory:
        for one in series(Path(directory), options.quick):
            one.prepared(one.sizes[0])() if one.variable != "tensors" else None  # libraries start up unmeasured
            points = [measured(one.prepared(size)) for size in one.sizes]
            fitted = exponent(one.sizes, [float(point["seconds"] or 0) for point in points])
            head = {"work": one.title, "variable": one.variable, "sizes": one.sizes, "theory": one.theory}
            report.append(head | {"points": points, "exponent": fitted})
    show(report, Console(width=120))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def show(report: Sequence[dict[str, Any]], console: Console) -> None:
    heads = ("work", "against", "exponent", "theory", "processor seconds, MB")
    table = Table(*heads, title=f"torch {torch.__version__}, {torch.get_num_threads()} threads", title_justify="left")
    for row in report:
        points = [
            f"{size}: {point['seconds']:.2g}" + ("" if point["megabytes"] is None else f", {point['megabytes']:.0f}")
            for size, point in zip(row["sizes"], row["points"], strict=True)
        ]
        table.add_row(row["work"], row["variable"], f"{row['exponent']:.1f}", f"{row['theory']:g}", "; ".join(points))
    console.print(table)


if __name__ == "__main__":
    main()
