"""TSV-Merge, DeVec and Iso-C on every layer shape of Llama 3: seconds of one matrix, of all, and what limits it.

    python examples/benchmarks/bench_layers.py [--models 1B 8B] [--shapes k_v q_o ...] [--tasks 4 8] [--device cuda]
                                               [--quick] [--json FILE]

T task matrices of rank side / T (a fourth of their directions in common) plus noise, side being the smaller one. Of
each set: `tsv_merge`, which keeps 1/T of every task's components, and `decompose` into shared and unique ones, with
the rank rule fraction:1/T. The alternative, in the same run and where a matrix is small enough (REFERENCE_WORK): a full
torch.linalg.svd in float32 of every task's matrix, then TSV-Merge's Algorithm 1 as written, or DeVec's equations 7
to 14 with their n x n projections (up to n = REFERENCE_SIDE), and one such SVD of the sum for Iso-C; elsewhere, and
without --large, the ratio is left blank. "all" is the number of
such matrices in the model times the seconds of one. The limit: which part of the time goes into matrix products and
decompositions, and the rate of the products beside that of a plain float64 product in the same run. "CPU" is the ratio
of the seconds that the process had on all cores, which others on the machine disturb less.

With a GPU the largest model is also gone through for real, layer by layer, and results are compared with the CPU's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_shared import dense_route
from bench_tsv import OPERATIONS, Stopwatch, components, reconstruct
from llama import LLAMA_1B, LLAMA_8B, Shape
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.methods.devec import Options, decompose
from tvbases_hf.methods.iso import iso_c
from tvbases_hf.methods.tsv import tsv_merge

MODELS = {"1B": LLAMA_1B, "8B": LLAMA_8B}
QUICK = Shape(hidden=256, intermediate=512, layers=2, key_value=128, vocabulary=1000)
LAYERS = {
    "k_v": ("k_proj", "v_proj"),
    "q_o": ("q_proj", "o_proj"),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "embedding": ("embed_tokens", "lm_head"),
}
ON_A_CPU = ("k_v", "q_o")  # the others take minutes each
REFERENCE_WORK, REFERENCE_SIDE = 2048**3, 2048
LARGE: list[bool] = []  # not empty: the alternative is run of any size
METHODS: dict[str, Callable[[Sequence[Delta]], list[Delta]]] = {
    "TSV-Merge": lambda deltas: [tsv_merge(deltas)],
    "DeVec": lambda deltas: _parts(deltas),
    "Iso-C": lambda deltas: [iso_c(deltas, [1.0] * len(deltas))],
}


def matrices(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """{layer: rows, columns and number of its matrices in the model}"""
    found: dict[str, tuple[int, int, int]] = {}
    for name, size in shape.tensors().items():
        for layer, ends in LAYERS.items():
            if any(end in name for end in ends):
                found[layer] = size[0], size[1], found.get(layer, (0, 0, 0))[2] + 1
    return {layer: found[layer] for layer in LAYERS}


def make_tasks(count: int, rows: int, columns: int, device: str, seed: int = 0, gap: bool = True) -> list[Tensor]:
    """[rows, columns] float32 each, see the module: singular values have a gap where TSV-Merge cuts, or none at all."""
    generator = torch.Generator(device).manual_seed(seed)
    rank = max(1, min(rows, columns) // count)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if not gap:
        return [numbers(rows, columns) for _ in range(count)]
    common = numbers(rows, rank // 4)
    return [
        torch.cat([common, numbers(rows, rank - rank // 4)], 1) @ numbers(rank, columns) + numbers(rows, columns)
        for _ in range(count)
    ]


def _parts(deltas: Sequence[Delta]) -> list[Delta]:
    """Unique components and the combined shared one."""
    split = decompose(deltas, Options(rank=1 / len(deltas)))
    return [*split.unique, split.combined]


class Limit(Stopwatch):
    """Seconds by operation, all of them waited for, and the operations of matrix products."""

    def __enter__(self) -> Limit:
        super().__enter__()
        self.products, self.total, self.cpu = 0, -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.total += time.perf_counter()
        self.cpu += time.process_time()
        super().__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "mm":
            self.products += 2 * args[0].numel() * args[1].shape[1]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def report(self) -> dict[str, Any]:
        shares = {name: self.seconds[operation] / self.total for name, operation in OPERATIONS.items()}
        return {"shares": shares, "gflops": self.products / max(1e-9, self.seconds["mm"]) / 1e9}


def compare(tasks: list[Tensor]) -> dict[str, dict[str, Any]]:
    """By method: seconds, the alternative's, their ratios (None where it is not affordable), and the difference."""
    deltas: list[Delta] = [Dense(task) for task in tasks]
    theirs = reference(tasks)
    found: dict[str, dict[str, Any]] = {}
    for method, work in METHODS.items():
        with Limit() as limit:
            ours = work(deltas)
        other, seconds, cpu = theirs.get(method, (None, None, None))
        found[method] = {
            "seconds": limit.total,
            "reference_seconds": seconds,
            "ratio": None if seconds is None else seconds / limit.total,
            "ratio_cpu": None if cpu is None or tasks[0].is_cuda else cpu / limit.cpu,
            "relative_difference": None if other is None else apart(ours, other),
            **limit.report(),
        }
        if tasks[0].is_cuda and _work(tasks[0]) <= REFERENCE_WORK:
            on_cpu = work([Dense(task.cpu()) for task in tasks])
            found[method]["cpu_difference"] = apart(ours, [dense(part, torch.float32) for part in on_cpu])
    return found


def reference(tasks: list[Tensor]) -> dict[str, tuple[list[Tensor], float, float]]:
    """What the alternative finds and its seconds, by the clock and of all cores; both methods need the same SVDs."""
    if _work(tasks[0]) > REFERENCE_WORK and not LARGE:
        return {}
    rank = max(1, min(tasks[0].shape) // len(tasks))
    parts, *svds = _timed(lambda: [components(task, rank) for task in tasks])
    merged, *rest = _timed(lambda: reconstruct(parts)[0])
    found = {"TSV-Merge": ([merged], svds[0] + rest[0], svds[1] + rest[1])}
    merged, *rest = _timed(lambda: flattened(sum(tasks[1:], tasks[0])))
    found["Iso-C"] = [merged], rest[0], rest[1]
    if len(tasks[0]) <= REFERENCE_SIDE:
        (unique, combined), *rest = _timed(lambda: dense_route([left for left, _, _ in parts], tasks))
        found["DeVec"] = [*unique, combined], svds[0] + rest[0], svds[1] + rest[1]
    return found


def flattened(total: Tensor) -> Tensor:
    """Iso-C as written: all singular values of the sum replaced by their mean."""
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return values.mean() * (left @ right)


def apart(ours: Sequence[Delta], theirs: Sequence[Tensor]) -> float:
    """Largest relative difference of the matrices, in the Frobenius norm."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((dense(a, torch.float32).to(b) - b).norm() / b.norm()) for a, b in pairs)


def whole(shape: Shape, count: int, device: str) -> dict[str, float]:
    """Seconds of each method through all matrices of a model, one after another; making the tasks is not counted."""
    seconds = dict.fromkeys(METHODS, 0.0)
    for seed, (rows, columns) in enumerate(s for s in shape.tensors().values() if len(s) == 2):
        deltas: list[Delta] = [Dense(task) for task in make_tasks(count, rows, columns, device, seed)]
        for method, work in METHODS.items():
            seconds[method] += _timed(lambda work=work, deltas=deltas: work(deltas))[1]
    return seconds


def plain_product(device: str, side: int) -> float:
    """GFLOP/s of a float64 product of two square matrices, the best of three."""
    a = torch.randn(side, side, dtype=torch.float64, device=device)
    return 2 * side**3 / min(_timed(lambda: a @ a)[1] for _ in range(3)) / 1e9


def _work(task: Tensor) -> int:
    return task.numel() * min(task.shape)


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, seconds by the clock, and of this process on all cores."""
    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started, time.process_time() - cpu


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="left out: 1B on a CPU, both on a GPU")
    parser.add_argument("--shapes", nargs="+", choices=LAYERS, help=f"left out: {', '.join(ON_A_CPU)} on a CPU")
    parser.add_argument("--tasks", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--all-layers", action="store_true", help="go through a whole model on a CPU, too")
    parser.add_argument("--large", action="store_true", help="the alternative for large matrices too: many minutes")
    parser.add_argument(
        "--gap", action=argparse.BooleanOptionalAction, default=True, help="in the spectra of the tasks"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, all shapes, four tasks")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    LARGE[:] = [True] * options.large
    on_gpu = options.device != "cpu"
    models = {name: MODELS[name] for name in options.models or (MODELS if on_gpu else ["1B"])}
    if options.quick:
        models, options.tasks = {"tiny": QUICK}, [4]
    layers = options.shapes or (LAYERS if on_gpu or options.quick else ON_A_CPU)
    console = Console(width=130)
    compare(make_tasks(2, 64, 64, options.device))  # libraries start up outside the measurement
    side = 256 if options.quick else 2048
    report: dict[str, Any] = {"device": options.device, "plain_gflops": plain_product(options.device, side), "rows": []}
    for model, shape in models.items():
        for layer, (rows, columns, number) in matrices(shape).items():
            for count in options.tasks if layer in layers else ():
                for method, row in compare(make_tasks(count, rows, columns, options.device, gap=options.gap)).items():
                    head = {"model": model, "layer": layer, "rows": rows, "columns": columns, "number": number}
                    report["rows"].append(head | {"tasks": count, "method": method} | row)
    show(report, console)
    left_out = [layer for layer in LAYERS if layer not in layers]
    if left_out:
        console.print(f"not run (on a CPU they take minutes each; see --shapes): {', '.join(left_out)}")
    if on_gpu or options.all_layers:
        model, count = list(models)[-1], options.tasks[-1]
        report["whole"] = {"model": model, "tasks": count, "seconds": whole(models[model], count, options.device)}
        for method, seconds in report["whole"]["seconds"].items():
            console.print(f"{model} shapes, T = {count}, all layers, total time of {method}: {seconds:.1f} s")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def show(report: dict[str, Any], console: Console) -> None:
    title = (
        f"{report['device']}, torch {torch.__version__}, {torch.get_num_threads()} threads; a plain float64 product: "
        f"{report['plain_gflops']:.0f} GFLOP/s"
    )
    heads = ("layer", "T", "method", "seconds", "full SVD", "ratio", "CPU", "difference", "all", "products", "eigh")
    table = Table(*heads, title=title, title_justify="left")
    blank = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    for row in report["rows"]:
        table.add_row(
            f"{row['model']} {row['layer']} {row['rows']} x {row['columns']}",
            str(row["tasks"]),
            row["method"],
            f"{row['seconds']:.2f}",
            blank(row["reference_seconds"], ".2f"),
            blank(row["ratio"], ".2f"),
            blank(row["ratio_cpu"], ".2f"),
            blank(row["relative_difference"], ".0e"),
            f"{row['number']} x: {row['number'] * row['seconds']:.0f} s",
            f"{row['shares']['matmul']:.0%} at {row['gflops']:.0f}",
            f"{row['shares']['eigh']:.0%}",
        )
    console.print(table)
    console.print(
        "seconds: one matrix of T tasks; full SVD: the alternative; all: matrices of the model times seconds;"
    )
    console.print("products: share of the time, and GFLOP/s in them; eigh: share of the time")
    on_cpu = [row["cpu_difference"] for row in report["rows"] if "cpu_difference" in row]
    if on_cpu:
        console.print(f"largest relative difference to the CPU's results, {len(on_cpu)} of them: {max(on_cpu):.0e}")


if __name__ == "__main__":
    main()
