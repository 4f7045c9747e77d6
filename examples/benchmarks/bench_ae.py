"""Autoencoder bases: how far above the least possible loss each solver stays, how well-conditioned, how fast.

    python examples/benchmarks/bench_ae.py [--quick] [--json FILE]

T task vectors in M bases, for three kinds of task vectors: alike in groups, sharing one direction, and unrelated. The
real Gram matrix of twelve fine-tunes (gram12.json: {"G": 12 x 12}) is added where it lies in a folder `data` beside the
repository, or in the one that TVBASES_DATA names. The excess is (loss - bound) / trace; the bound is the spectral one
for free bases, and for balanced ones the least loss of any M-dimensional subspace that holds the sum of the task
vectors. Free bases cannot always attain theirs (Theorem 3.4 of the paper); unrelated task vectors show that.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tvbases_hf import ae_bases

SIZES = ((8, 4), (20, 10), (72, 18), (200, 50))
KINDS = ("groups", "common direction", "unrelated")
SOLVERS: dict[str, dict[str, Any]] = {
    "varpro, balanced": {},
    "varpro, free": {"balance": False},
    "adam (the paper)": {"balance": False, "solver": "adam"},
}


def real_gram() -> Tensor | None:
    folder = os.environ.get("TVBASES_DATA")
    beside = Path(__file__).resolve().parents[3].glob("*/data/gram12.json")
    files = [Path(folder) / "gram12.json"] if folder else list(beside)
    if not files or not files[0].is_file():
        return None
    return torch.tensor(json.loads(files[0].read_text(encoding="utf-8"))["G"], dtype=torch.float64)


def synthetic_gram(kind: str, num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = 3 * num_tasks
    matrix = torch.randn(rows, num_tasks, generator=generator, dtype=torch.float64)
    if kind == "groups":
        groups = max(2, num_tasks // 5)
        centres = torch.randn(rows, groups, generator=generator, dtype=torch.float64)
        matrix = centres[:, torch.arange(num_tasks) % groups] + 0.3 * matrix
    elif kind == "common direction":
        matrix = matrix + 3 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return matrix.T @ matrix


def measure(gram: Tensor, num_bases: int, options: dict[str, Any]) -> dict[str, float]:
    start = time.perf_counter()
    found = ae_bases(gram, num_bases, **options)
    seconds = time.perf_counter() - start
    return {
        "bound": found.bound / found.total,
        "excess": max(0.0, (found.loss - found.bound) / found.total),
        "condition": found.condition,
        "largest_decoder_entry": float(found.decoder.abs().max()),
        "seconds": seconds,
    }


def cases(sizes: tuple[tuple[int, int], ...]) -> list[tuple[str, Tensor, int]]:
    found = [(f"{kind}, T={t} M={m}", synthetic_gram(kind, t), m) for t, m in sizes for kind in KINDS]
    real = real_gram()
    if real is not None:
        found = [(f"real, T=12 M={m}", real, m) for m in (2, 4, 6)] + found
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smaller sizes, and fewer Adam steps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    steps = {"steps": 500} if options.quick else {}
    ae_bases(synthetic_gram("groups", 8), 2, balance=False)  # torch loads parts of itself at the first gradient

    table = Table("task vectors", "solver", "bound", "excess", "cond", "|decoder|", "seconds")
    results = []
    for name, gram, num_bases in cases(SIZES[:2] if options.quick else SIZES):
        for solver, settings in SOLVERS.items():
            found = measure(gram, num_bases, {**settings, **(steps if "adam" in solver else {})})
            results.append({"case": name, "solver": solver, **found})
            table.add_row(
                name,
                solver,
                f"{found['bound']:.5f}",
                f"{found['excess']:.1e}",
                f"{found['condition']:.1f}",
                f"{found['largest_decoder_entry']:.1f}",
                f"{found['seconds']:.2f}",
            )
        table.add_section()
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
