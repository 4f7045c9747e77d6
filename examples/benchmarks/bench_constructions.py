"""Why an autoencoder: what every construction loses at equal bytes, of single tasks and of their sum.

    python examples/benchmarks/bench_constructions.py [--json FILE]

All figures come from a Gram matrix alone: that of twelve real fine-tunes, where it is found (see bench_ae.py), and a
generated one of tasks in groups. Equal bytes: as many stored vectors; PCA stores its mean as one of them.

* tasks: the share of the tasks' energy (squared norm) that the reconstructions lose
* worst: the same of the task that loses most
* sum: the share of the energy of the sum of all tasks that the sum of the bases lacks, at its best scale: what task
  arithmetic over the bases loses
* convex: whether all bases are convex combinations of the tasks, so that data can be mixed by the encoder
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bench_ae import real_gram, synthetic_gram
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tvbases_hf.bases import CONSTRUCTIONS, BasisWeights

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoencoder, balanced": ("ae", {}),
    "autoencoder, free": ("ae", {"balance": False}),
    "PCA and its mean": ("pca", {}),
    "PCA, positive shares": ("pca_positive", {}),
    "non-negative PCA": ("pca_nonnegative", {}),
    "convex NMF": ("nmf", {}),
    "dictionary learning": ("dictionary", {}),
    "clusters": ("cluster", {}),
    "random choice": ("rand_select", {}),
}


def bases_of(kind: str, gram: Tensor, stored: int) -> BasisWeights | None:
    """``stored`` vectors of this kind; None where there is no such basis (PCA of a mean alone)."""
    method, options = KINDS[kind]
    count = stored - CONSTRUCTIONS[method].has_mean
    return CONSTRUCTIONS[method].solve(gram, count, **options) if count else None


def figures(gram: Tensor, bases: BasisWeights) -> dict[str, float | bool]:
    left = bases.reconstruction - torch.eye(len(gram), dtype=torch.float64)
    per_task = (left * (gram @ left)).sum(dim=0).clamp_min(0) / gram.diagonal()
    ones, effective = torch.ones(len(gram), dtype=torch.float64), bases.effective_weights
    along, square = ones @ gram @ effective, effective @ gram @ effective
    kept = along.square() / square / (ones @ gram @ ones) if square > 0 else torch.zeros(())
    return {
        "tasks": bases.loss / float(gram.trace()),
        "worst": float(per_task.max()),
        "sum": max(0.0, 1 - float(kept)),
        "convex": bool(bases.encoder.min() >= 0),
    }


def cases() -> list[tuple[str, Tensor, int]]:
    real, grouped = real_gram(), synthetic_gram("groups", 20)
    found = [("twelve fine-tunes", real, m) for m in (3, 6)] if real is not None else []
    return [*found, *(("twenty tasks in groups", grouped, m) for m in (5, 10))]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    table = Table("task vectors", "vectors", "bases", "tasks", "worst", "sum", "convex", title="lost energy")
    results: list[dict[str, Any]] = []
    for name, gram, stored in cases():
        for kind in KINDS:
            if (bases := bases_of(kind, gram, stored)) is None:
                continue
            found = figures(gram, bases)
            results.append({"case": name, "vectors": stored, "bases": kind, **found})
            lost = [f"{found[key]:.1%}" for key in ("tasks", "worst", "sum")]
            table.add_row(name, str(stored), kind, *lost, "yes" if found["convex"] else "no")
        table.add_section()
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
