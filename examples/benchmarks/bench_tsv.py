"""TSV-Merge of one weight matrix of many tasks, against the plain dense route, interleaved in one run.

    python examples/benchmarks/bench_tsv.py [--quick] [--json FILE]

The dense route is what the paper's algorithm says: a full torch.linalg.svd in float32 of every task's matrix, P Q^T by
the SVDs of the concatenated U and V, and the product. Ours is `tsv_merge` and the same product. One set of matrices
has a gap in its singular values where the tasks are cut, the other has none: there the fast route gives up and the
exact one runs. With a GPU the same runs there too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tvbases_hf.algebra.delta import Dense, LowRank, dense
from tvbases_hf.methods.tsv import tsv_merge

OPERATIONS = {"matmul": "mm", "eigh": "_linalg_eigh", "qr": "linalg_qr", "svd": "_linalg_svd"}


def make_tasks(count: int, rows: int, columns: int, gap: bool, device: str) -> list[Tensor]:
    """Float32 matrices with singular values 1 / sqrt(i), a fifth of that after the first 1/T of them if ``gap``."""
    generator = torch.Generator().manual_seed(0)
    small = min(rows, columns)
    index = torch.arange(small)
    values = (1 + index) ** -0.5 * torch.where((index >= small // count) & gap, 0.2, 1.0)

    def basis(side: int) -> Tensor:
        return torch.linalg.qr(torch.randn(side, small, generator=generator).to(device)).Q

    return [(basis(rows) * values.to(device)) @ basis(columns).T for _ in range(count)]


def components(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1, lines 2 and 3, as written."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank].T


def reconstruct(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Lines 5 to 16: the merged matrix, and the energy of the components kept."""
    left, values, right = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return (_procrustes(left) * values) @ _procrustes(right).T, float(values.double().square().sum())


def ours(matrices: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The same by tsv_merge; the columns of U' S are as long as the singular values kept."""
    merged = tsv_merge([Dense(matrix) for matrix in matrices])
    assert isinstance(merged, LowRank)
    return dense(merged, torch.float32), float(merged.left.double().square().sum())


def compare(matrices: Sequence[Tensor], repeats: int) -> dict[str, Any]:
    """Seconds of both routes, their ratio, and how far the results are apart.

    Ours runs ``repeats`` times, spread over the SVDs of the dense route, so that other work on the machine meets both.
    """
    ours(matrices[:2])  # threads and libraries start up outside the measurement
    rank, every = min(matrices[0].shape) // len(matrices), max(1, len(matrices) // repeats)
    watch = {"plain": Watch(matrices[0]), "ours": Watch(matrices[0])}
    parts = []
    for index, matrix in enumerate(matrices):
        with watch["plain"]:
            parts.append(components(matrix, rank))
        if index % every == 0:
            with watch["ours"]:
                mine, captured = ours(matrices)
    with watch["plain"]:
        theirs, energy = reconstruct(parts)
    runs = len(range(0, len(matrices), every))
    plain, own = watch["plain"], watch["ours"]
    return {
        "seconds": {"plain": plain.wall, "ours": own.wall / runs},
        "ratio": {"wall": runs * plain.wall / own.wall, "cpu": runs * plain.cpu / own.cpu},
        "relative_difference": float((mine - theirs).double().norm() / theirs.double().norm()),
        "energy_difference": abs(captured / energy - 1),
        "share_of_time": _shares(matrices),
    }


class Watch:
    """Seconds inside the blocks: by the clock, and of this process on all cores (robust against others)."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.wall, self.cpu = like, 0.0, 0.0

    def __enter__(self) -> None:
        _synchronize(self.like)
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def __exit__(self, *failure: object) -> None:
        _synchronize(self.like)
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the size")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=4, help="of ours, spread over one run of the dense route")
    parser.add_argument("--threads", type=int, help="of torch; fewer on a machine that is busy")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.rows, options.columns = options.rows // 2, options.columns // 2
    found: dict[str, Any] = {"tasks": options.tasks, "shape": [options.rows, options.columns]}
    print(f"TSV-Merge of {options.tasks} matrices {options.rows} x {options.columns}, float32; {_machine()}")
    print("plain and ours: seconds by the clock; CPU: of all cores, which other processes disturb less")
    print(f"{'':14}{'plain':>9}{'ours':>9}{'ratio':>8}{'CPU':>8}{'difference':>12}{'energy':>10}  where our time goes")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for spectrum in ("gap", "no gap"):
            matrices = make_tasks(options.tasks, options.rows, options.columns, spectrum == "gap", device)
            figures = found[f"{device}, {spectrum}"] = compare(matrices, options.repeats)
            print(f"{f'{device}, {spectrum}':14}" + _row(figures), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _row(figures: dict[str, Any]) -> str:
    seconds, ratio = figures["seconds"], figures["ratio"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in figures["share_of_time"].items())
    return (
        f"{seconds['plain']:9.2f}{seconds['ours']:9.2f}{ratio['wall']:8.1f}{ratio['cpu']:8.1f}"
        f"{figures['relative_difference']:12.1e}{figures['energy_difference']:10.1e}  {shares}"
    )


def _procrustes(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _shares(matrices: Sequence[Tensor]) -> dict[str, float]:
    """Share of our time in matrix products and in each decomposition; the rest is copying and conversion."""
    with Stopwatch() as seen:
        ours(matrices)
    total = sum(seen.seconds.values())
    shares = {name: seen.seconds[operation] / total for name, operation in OPERATIONS.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


class Stopwatch(TorchDispatchMode):
    """Seconds spent in every operation of torch inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                _synchronize(part)
        self.seconds[func.overloadpacket.__name__] += time.perf_counter() - start
        return result


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads{gpu}"


if __name__ == "__main__":
    main()
