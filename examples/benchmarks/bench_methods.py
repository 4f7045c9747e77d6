"""Merge methods side by side on real fine-tunes, each merged by mergekit: accuracy on eight tasks, and forgetting one.

    python examples/benchmarks/bench_methods.py [--quick] [--json FILE]

The fine-tunes are those of `tvbases demo` (all-MiniLM-L6-v2, about a minute to train, cached). For every method the
model is merged once with lambda 1; lambda is then chosen on validation sentences along the line from the base, the
chosen model is merged again by mergekit and evaluated from disk. Negation (last table) merges one task with a
negative weight: its accuracy should fall, that of the others should stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tvbases_demo import encoder
from tvbases_demo.compare import evaluate
from tvbases_demo.run import DEFAULT_WORKDIR, Settings, fine_tunes
from tvbases_hf.storage.checkpoint import Checkpoint

LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0)
# What a user would type: merge_method and parameters.
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"merge_method": "task_arithmetic", "weight": 1.0},
    "ties": {"merge_method": "ties", "weight": 1.0, "density": 0.2},
    "tsv": {"merge_method": "tsv"},
    "tsv, no orthogonalisation": {"merge_method": "tsv", "orthogonalize": False},
    "tsv, full rank": {"merge_method": "tsv", "low_rank": False},
    "tsv_compress": {"merge_method": "tsv_compress"},
    "ae_bases M=4": {"merge_method": "ae_bases", "num_bases": 4},
    "ae_bases M=4, merge: tsv": {"merge_method": "ae_bases", "num_bases": 4, "merge": "tsv"},
    "ae_bases M=4, tsv over reconstructions": {
        "merge_method": "ae_bases", "num_bases": 4, "merge": "tsv", "over": "reconstructions",
    },
    "devec_unique": {"merge_method": "devec_unique", "rank": "fraction:0.25"},
    "devec_unique + shared_weight 1": {"merge_method": "devec_unique", "rank": "fraction:0.25", "shared_weight": 1.0},
    "devec pairs + shared_weight 0.5": {
        "merge_method": "devec_unique", "rank": "fraction:0.25", "pool": "pairs", "shared_weight": 0.5,
    },
}  # fmt: skip


class Bench:
    """The base, the fine-tunes and their tasks; merges through mergekit and evaluates."""

    def __init__(self, workdir: Path, settings: Settings, scratch: Path) -> None:
        self.problems, self.models, _ = fine_tunes(workdir, settings, Console(quiet=True))
        self.base, self.scratch = workdir / "base", scratch
        self.origin = _weights(Checkpoint.open(self.base))
        self.model = encoder.load(self.base)[0]

    def merge(self, config: Mapping[str, Any], weights: Mapping[str, float] | None = None) -> Checkpoint:
        """Run mergekit on a YAML file with these parameters; the merged checkpoint."""
        from tvbases_mergekit.command import merge

        parameters = {key: value for key, value in config.items() if key != "merge_method"}
        models = [{"model": str(path)} | _weight(weights, name) for name, path in self.models.items()]
        document = {
            "merge_method": config["merge_method"],
            "base_model": str(self.base),
            "models": models,
            "parameters": parameters,
            "dtype": "float32",
        }
        file, out = self.scratch / "merge.yml", self.scratch / "merged"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        merge([str(file), str(out), "--quiet"])
        return Checkpoint.open(out)

    def accuracy(self, weights: Mapping[str, Tensor], split: str, limit: int | None = None) -> list[float]:
        """[T] per cent correct with these weights."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
            return evaluate(self.model, self.problems, split, limit)

    def line(self, merged: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        return {name: start + scale * (merged[name] - start) for name, start in self.origin.items()}


def _weight(weights: Mapping[str, float] | None, name: str) -> dict[str, Any]:
    return {} if weights is None else {"parameters": {"weight": weights[name]}}


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {n: checkpoint.read(n).clone() for n, info in checkpoint.tensors.items() if info.dtype.is_floating_point}


def climb(score: Callable[[float], float], grid: tuple[float, ...] = LAMBDAS) -> float:
    """The best of an ascending grid for a score with one peak: stop when two in a row are worse than the best."""
    best, value, worse = grid[0], float("-inf"), 0
    for point in grid:
        found = score(point)
        best, value, worse = (point, found, 0) if found > value else (best, value, worse + 1)
        if worse == 2:
            break
    return best


def compare(bench: Bench, names: list[str], validation: int) -> Iterator[dict[str, Any]]:
    """One row per method: the chosen lambda and the test accuracy of the model that mergekit wrote."""
    for name in names:
        config = METHODS[name]
        merged = _weights(bench.merge({**config, "lambda": 1.0}))
        best = climb(lambda scale, merged=merged: sum(bench.accuracy(bench.line(merged, scale), "val", validation)))
        written = _weights(bench.merge({**config, "lambda": best}))
        accuracy = bench.accuracy(written, "test")
        yield {"method": name, "lambda": best, "accuracy": accuracy, "mean": sum(accuracy) / len(accuracy)}


def forget(bench: Bench, target: str, validation: int) -> Iterator[dict[str, Any]]:
    """Negate one task, whole or only its unique part, as far as the other tasks keep 95 % of the base's accuracy."""
    tasks = list(bench.models)
    position = tasks.index(target)
    weights = {task: -1.0 if task == target else 0.0 for task in tasks}
    before = bench.accuracy(bench.origin, "val", validation)
    control = _without(before, position)
    configs = {
        "task vector": {"merge_method": "task_arithmetic"},
        "AE reconstruction, M=4": {"merge_method": "ae_bases", "num_bases": 4},
        "unique component": {"merge_method": "devec_unique", "rank": "fraction:0.25", "pool": "iterative"},
    }
    yield {"method": "base", "lambda": 0.0, "target": bench.accuracy(bench.origin, "test")[position],
           "others": _without(bench.accuracy(bench.origin, "test"), position)}  # fmt: skip
    for name, config in configs.items():
        merged = _weights(bench.merge({**config, "lambda": 1.0}, weights))
        allowed = 0.0
        for scale in LAMBDAS:
            if _without(bench.accuracy(bench.line(merged, scale), "val", validation), position) < 0.95 * control:
                break
            allowed = scale
        found = bench.accuracy(bench.line(merged, allowed), "test")
        yield {"method": name, "lambda": allowed, "target": found[position], "others": _without(found, position)}


def _without(values: list[float], position: int) -> float:
    others = [value for index, value in enumerate(values) if index != position]
    return sum(others) / len(others)


def run(workdir: Path, settings: Settings, names: list[str], target: str, validation: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(workdir, settings, Path(scratch))
        rows = list(compare(bench, names, validation))
        negation = list(forget(bench, target, validation))
        return {"tasks": list(bench.models), "methods": rows, "target": target, "negation": negation}


def show(found: Mapping[str, Any]) -> None:
    console = Console(width=140)
    table = Table("method", "lambda", "mean", *found["tasks"], title="accuracy, %", title_justify="left")
    for row in found["methods"]:
        table.add_row(row["method"], f"{row['lambda']:g}", f"{row['mean']:.1f}", *(f"{a:.0f}" for a in row["accuracy"]))
    console.print(table)
    title = f"forgetting {found['target']}: the largest lambda that keeps 95 % of the others"
    negation = Table(
        "negated", "lambda", f"{found['target']} (down)", "others (kept)", title=title, title_justify="left"
    )
    for row in found["negation"]:
        negation.add_row(row["method"], f"{row['lambda']:g}", f"{row['target']:.1f}", f"{row['others']:.1f}")
    console.print(negation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four methods, fewer validation sentences")
    parser.add_argument("--workdir", type=Path, default=DEFAULT_WORKDIR, help="where the demo keeps its models")
    parser.add_argument("--target", default="sentiment", help="the task to forget")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    names = ["task_arithmetic", "ties", "tsv", "ae_bases M=4"] if options.quick else list(METHODS)
    workdir = options.workdir.expanduser().absolute()
    found = run(workdir, Settings(), names, options.target, 30 if options.quick else 40)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
