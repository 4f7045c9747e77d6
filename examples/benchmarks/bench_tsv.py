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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tvbases_hf.delta import Dense, LowRank, dense
from tvbases_hf.singular import tsv_merge

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


def plain(matrices: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Algorithm 1 as it is written: the merged matrix and the energy of the components kept."""
    rank = min(matrices[0].shape) // len(matrices)
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    values = torch.cat([part.S[:rank] for part in parts])
    left, right = _procrustes([part.U[:, :rank] for part in parts]), _procrustes([part.Vh[:rank].T for part in parts])
    return (left * values) @ right.T, float(values.double().square().sum())


def ours(matrices: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The same by tsv_merge; the columns of U' S are as long as the singular values kept."""
    merged = tsv_merge([Dense(matrix) for matrix in matrices])
    assert isinstance(merged, LowRank)
    return dense(merged, torch.float32), float(merged.left.double().square().sum())


def compare(matrices: Sequence[Tensor], repeats: int) -> dict[str, Any]:
    """Seconds of both routes (best of the repeats), their ratio, and how far the results are apart."""
    ours(matrices[:2])  # threads and libraries start up outside the measurement
    runs = [(_timed(plain, matrices), _timed(ours, matrices)) for _ in range(repeats)]
    (theirs, energy), (mine, captured) = runs[-1][0][0], runs[-1][1][0]
    best = {
        route: {clock: min(run[i][1][clock] for run in runs) for clock in ("wall", "cpu")}
        for i, route in enumerate(("plain", "ours"))
    }
    return {
        "seconds": best,
        "ratio": {clock: best["plain"][clock] / best["ours"][clock] for clock in ("wall", "cpu")},
        "relative_difference": float((mine - theirs).double().norm() / theirs.double().norm()),
        "energy_difference": abs(captured / energy - 1),
        "share_of_time": _shares(matrices),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the size, once")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch; fewer on a machine that is busy")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.rows, options.columns, options.repeats = options.rows // 2, options.columns // 2, 1
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
        f"{seconds['plain']['wall']:9.2f}{seconds['ours']['wall']:9.2f}{ratio['wall']:8.1f}{ratio['cpu']:8.1f}"
        f"{figures['relative_difference']:12.1e}{figures['energy_difference']:10.1e}  {shares}"
    )


def _procrustes(blocks: Sequence[Tensor]) -> Tensor:
    left, _, right = torch.linalg.svd(torch.cat(list(blocks), 1), full_matrices=False)
    return left @ right


def _timed(
    route: Callable[[Sequence[Tensor]], tuple[Tensor, float]], matrices: Sequence[Tensor]
) -> tuple[tuple[Tensor, float], dict[str, float]]:
    """What the route gives, and its seconds by the clock and of this process on all cores (robust against others)."""
    _synchronize(matrices[0])
    wall, cpu = time.perf_counter(), time.process_time()
    found = route(matrices)
    _synchronize(matrices[0])
    return found, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


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
