"""Shared and unique components of adapters: factor space against n x n projections, and the paper's toy experiment.

    python examples/benchmarks/bench_shared.py [--quick] [--json FILE] [--plot FILE]

First table: `decompose` of rank-r adapters of one n x n weight, against the dense route of the paper's equations 7 to
14 (projections, their product, its eigenvectors, the projected changes); that one is given the column spaces, which
would cost it a full SVD per task on top. Second: our time as n and r grow. Third: figure 8 of the paper: 100 planted
directions shared by two tasks, the eigenvalues of P_1 P_2 and how far the recovered directions are off under noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvbases_hf.algebra.delta import LowRank, dense
from tvbases_hf.methods.devec import THRESHOLD, Decomposition, column_space, decompose, shared_subspace, spectrum

COMMON = 4  # directions that the adapters share, planted
NOISE = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03)
SUBSPACES = ("chain", "mean")


def make_adapters(count: int, side: int, rank: int) -> list[LowRank]:
    """Adapters of one square weight whose column spaces have COMMON directions in common."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(side, min(COMMON, rank // 2), generator=generator)
    adapters = []
    for _ in range(count):
        own = torch.randn(side, rank - shared.shape[1], generator=generator)
        mixing = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        adapters.append(LowRank(torch.cat([shared, own], 1) @ mixing, torch.randn(rank, side, generator=generator)))
    return adapters


def dense_route(spaces: Sequence[Tensor], changes: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Equations 7 to 14 as they are written: unique components and the combined shared one."""
    chain = functools.reduce(torch.matmul, [space @ space.T for space in spaces])
    values, vectors = torch.linalg.eig(chain)
    vectors = torch.where(values.imag < 0, vectors.imag, vectors.real)  # a plane of two conjugate eigenvectors
    chosen = torch.linalg.qr(vectors[:, values.real > THRESHOLD]).Q
    projection = chosen @ chosen.T
    shared = [projection @ change for change in changes]
    norms = [part.norm() for part in shared]
    combined = sum((norm * part for norm, part in zip(norms, shared, strict=True)), torch.zeros(())) / sum(norms)
    return [change - part for change, part in zip(changes, shared, strict=True)], combined


def compare(count: int, side: int, rank: int) -> dict[str, float]:
    adapters = make_adapters(count, side, rank)
    ours = _seconds(lambda: decompose(adapters))
    spaces, changes = [column_space(a, 1) for a in adapters], [dense(a, torch.float32) for a in adapters]
    started = time.perf_counter(), time.process_time()
    unique, combined = dense_route(spaces, changes)
    plain = time.perf_counter() - started[0], time.process_time() - started[1]
    again = _seconds(lambda: decompose(adapters))  # before and after, since the machine may be busy
    mine = min(ours[0], again[0]), min(ours[1], again[1])
    return {
        "dense_seconds": plain[0],
        "seconds": mine[0],
        "ratio": plain[0] / mine[0],
        "ratio_cpu": plain[1] / mine[1],
        "relative_difference": _difference(decompose(adapters), unique, combined),
    }


def scaling(sides: Sequence[int], ranks: Sequence[int]) -> dict[str, Any]:
    """Our CPU seconds along both axes, and the exponents over the last two doublings: O(n r^2)."""

    def seconds(side: int, rank: int) -> float:
        adapters = make_adapters(2, side, rank)
        return _seconds(lambda: decompose(adapters))[1]

    by_side = {side: seconds(side, ranks[0]) for side in sides}
    by_rank = {rank: seconds(sides[-1], rank) for rank in ranks}
    return {"n": by_side, "r": by_rank, "exponent_n": _exponent(by_side), "exponent_r": _exponent(by_rank)}


def toy(side: int, common: int, own: int, runs: int) -> dict[str, Any]:
    """Degrees of sharing of two tasks, and mean angle in degrees to the planted directions, per noise sigma."""
    found: dict[str, Any] = {"degrees": {}, "angle": {name: [] for name in SUBSPACES}, "recovered": []}
    for sigma in NOISE:
        angles: dict[str, list[float]] = {name: [] for name in SUBSPACES}
        counts = []
        for seed in range(runs):
            planted, spaces = _toy_spaces(seed, side, common, own, sigma)
            values = spectrum(spaces)[0].sort(descending=True).values
            counts.append(int((values > THRESHOLD).sum()))
            # As many as were planted, whatever their eigenvalues: the threshold is judged by "recovered".
            cut = float(values[common - 1 : common + 1].mean())
            for name in SUBSPACES:
                directions = shared_subspace(spaces, cut, name)
                cosines = torch.linalg.svdvals(planted.T @ directions).clamp_max(1)
                angles[name].append(float(cosines.acos().rad2deg().mean()))
            if seed == 0:
                found["degrees"][str(sigma)] = values.tolist()
        for name in SUBSPACES:
            found["angle"][name].append(sum(angles[name]) / runs)
        found["recovered"].append(sum(counts) / runs)
    return found


def plot(found: dict[str, Any], file: Path) -> None:
    """Figure 8: the eigenvalues in clusters, and the recovery angle against the noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for sigma in (NOISE[0], NOISE[2], NOISE[4]):
        left.plot(found["degrees"][str(sigma)], ".", markersize=4, label=f"noise {sigma:g}")
    left.axhline(THRESHOLD, color="grey", linewidth=1, linestyle="--", label=f"threshold {THRESHOLD}")
    left.set(title="Eigenvalues of $P_1 P_2$", xlabel="index", ylabel="eigenvalue", ylim=(-0.03, 1.05))
    left.legend()
    for name in SUBSPACES:
        right.plot(NOISE, found["angle"][name], "o-", label=f'subspace "{name}"')
    right.set(title="Planted against recovered directions", xlabel="noise $\\sigma$", ylabel="mean angle in degrees")
    right.set_ylim(bottom=0)
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the size")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the toy experiment to this file")
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5, help="repetitions of the toy experiment")
    parser.add_argument("--threads", type=int, help="of torch; fewer on a machine that is busy")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    side = options.side // 4 if options.quick else options.side
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"Adapters of rank {options.rank}, {side} x {side}; {machine}")
    print(f"{'tasks':>5}{'dense s':>10}{'ours s':>10}{'ratio':>9}{'CPU':>9}{'difference':>12}")
    found: dict[str, Any] = {"side": side, "rank": options.rank, "routes": {}}
    for count in (2, 4):
        row = found["routes"][count] = compare(count, side, options.rank)
        print(
            f"{count:5}{row['dense_seconds']:10.2f}{row['seconds']:10.4f}{row['ratio']:9.0f}{row['ratio_cpu']:9.0f}"
            f"{row['relative_difference']:12.1e}",
            flush=True,
        )
    sides, ranks = [side // 2, side, 2 * side, 4 * side], [options.rank * factor for factor in (1, 2, 4, 8)]
    growth = found["scaling"] = scaling(sides, ranks)
    print("\nOurs, two tasks, CPU seconds")
    for name, fixed in (("n", f"r = {ranks[0]}"), ("r", f"n = {sides[-1]}")):
        times = "   ".join(f"{value}: {seconds:.4f}" for value, seconds in growth[name].items())
        print(f"  {name} at {fixed:10} {times}   last doublings: {name}^{growth[f'exponent_{name}']:.2f}")
    small = 100 if side >= 1000 else max(4, side // 10)
    shown = found["toy"] = toy(4 * small, small, small // 2, options.runs)
    print(f"\nToy experiment: {small} of {small + small // 2} directions in R^{4 * small} shared by two tasks")
    print("  noise sigma     " + "".join(f"{sigma:8g}" for sigma in NOISE))
    print(f"  found above {THRESHOLD}" + "".join(f"{count:8.1f}" for count in shown["recovered"]))
    for name in SUBSPACES:
        print(f"  degrees, {name:6} " + "".join(f"{angle:8.2f}" for angle in shown["angle"][name]))
    if options.plot:
        plot(shown, options.plot)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _toy_spaces(seed: int, side: int, common: int, own: int, sigma: float) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal planted directions, and the column spaces of two tasks that hold them, noise added."""
    generator = torch.Generator().manual_seed(seed)
    numbers = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    planted = torch.linalg.qr(numbers(side, common)).Q
    tasks = [torch.cat([planted, torch.linalg.qr(numbers(side, own)).Q], 1) for _ in range(2)]
    return planted, [torch.linalg.qr(task + sigma * numbers(*task.shape)).Q for task in tasks]


def _difference(split: Decomposition, unique: Sequence[Tensor], combined: Tensor) -> float:
    pairs = zip([*split.unique, split.combined], [*unique, combined], strict=True)
    return max(float((dense(part, torch.float32) - other).norm() / other.norm()) for part, other in pairs)


def _seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Best of three: by the clock, and of this process on all cores (robust against others)."""
    times = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def _exponent(seconds: dict[int, float]) -> float:
    (first, a), (last, b) = list(seconds.items())[-3], list(seconds.items())[-1]
    return math.log(b / a) / math.log(last / first)


if __name__ == "__main__":
    main()
