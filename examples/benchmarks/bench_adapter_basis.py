"""Error against bytes of a basis of adapters: truncation alone, sums and shared factors; one seed, different seeds.

    python examples/benchmarks/bench_adapter_basis.py [--quick] [--json FILE] [--workdir DIR]

Rank-8 LoRAs of all-MiniLM-L6-v2 are trained on the demo's tasks, once all from one seed and once each from its own, and
kept in the work directory. Every figure is the squared error relative to the adapter's squared norm, the mean over the
tasks, before rounding; `chosen` is what `tvbases compress --budget` takes. Takes minutes on two cores, mostly training.

    same seed: 93% of the input and 9% of the output directions in common (by chance 2%)
     bytes  truncated    joint     sums  chosen
       90%    0.00153  0.00002  0.22673  joint
       75%    0.01197  0.00064  0.23032  joint
       60%    0.03557  0.01207  0.24276  joint
       50%    0.06176  0.03517  0.25932  joint
       40%    0.10046  0.07419  0.28670  joint
       25%    0.20133  0.18212  0.36185  joint
       10%    0.44660  0.42797  0.54212  joint

    different seed: 2% of the input and 9% of the output directions in common (by chance 2%)
     bytes  truncated    joint     sums  chosen
       90%    0.00167  0.00167  0.26394  tsv
       75%    0.01223  0.01223  0.27471  tsv
       60%    0.03589  0.03589  0.29203  tsv
       50%    0.06219  0.06219  0.31020  tsv
       40%    0.10146  0.10146  0.33785  tsv
       25%    0.20053  0.20053  0.40703  tsv
       10%    0.44771  0.44761  0.56750  tsv
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tvbases_demo import encoder, store
from tvbases_demo.tasks import make_task
from tvbases_hf.basis import Basis
from tvbases_hf.models.vectors import Vectors

TASKS = ("tense", "negation", "question", "sentiment")
BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.25, 0.1)
METHODS = ("tsv", "joint", "ae")
MODES = ("same", "different")
MODULES = ["query", "key", "value", "dense"]


def train(root: Path, tasks: tuple[str, ...], sentences: int) -> tuple[Path, dict[str, dict[str, Path]]]:
    """The base, and adapters by mode and task; those that are there already are kept."""
    from peft import LoraConfig, get_peft_model

    base = store.base_model(root / "base", quiet=True)
    found: dict[str, dict[str, Path]] = {mode: {task: root / mode / task for task in tasks} for mode in MODES}
    for mode, paths in found.items():
        for index, (task, path) in enumerate(paths.items()):
            if (path / "adapter_config.json").is_file():
                continue
            print(f"training {mode}/{task}", flush=True)
            model, tokenizer = encoder.load(base)
            problem = encoder.prepare(model, tokenizer, make_task(task, 0, (sentences, 4, 4)))
            torch.manual_seed(0 if mode == "same" else 100 + index)
            adapted: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=MODULES))  # type: ignore[arg-type]
            encoder.fine_tune(adapted, problem.head, problem.train, encoder.Recipe(lr=1e-3))
            adapted.save_pretrained(str(path))
    return base, found


def measure(base: Path, paths: dict[str, Path], budgets: tuple[float, ...]) -> dict[str, Any]:
    """Mean squared relative errors by budget and method, and how much the adapters have in common."""
    vectors = Vectors.open(base, paths)
    rows, overlap = {}, {}
    for budget in budgets:
        info = Basis.build(vectors, budget=budget).info
        assert info.adapters is not None
        squares = {method: info.adapters.candidates[method] ** 2 for method in METHODS}
        stored = sum(error**2 for error in info.task_error) / len(info.task_error)
        rows[str(budget)] = {**squares, "chosen": info.method, "as stored": stored}
        overlap = info.adapters.overlap
    return {"errors": rows, "overlap": overlap}


def show(mode: str, found: dict[str, Any]) -> None:
    overlap = found["overlap"]
    print(
        f"\n{mode} seed: {overlap['input']:.0%} of the input and {overlap['output']:.0%} of the output directions in "
        f"common (by chance {overlap['input_by_chance']:.0%})"
    )
    print(f"{'bytes':>6} {'truncated':>10} {'joint':>8} {'sums':>8}  chosen")
    for budget, row in found["errors"].items():
        figures = f"{row['tsv']:10.5f} {row['joint']:8.5f} {row['ae']:8.5f}"
        print(f"{float(budget):6.0%} {figures}  {row['chosen']}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three tasks, ten steps each, three budgets")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="keep the trained adapters here for the next run")
    options = parser.parse_args(arguments)
    tasks, sentences = (TASKS[:3], 160) if options.quick else (TASKS, 600)
    budgets = (0.75, 0.5, 0.25) if options.quick else BUDGETS
    with tempfile.TemporaryDirectory() as scratch:
        root = options.workdir or Path(scratch)
        base, adapters = train(root, tasks, sentences)
        report = {}
        for mode, paths in adapters.items():
            report[mode] = measure(base, paths, budgets)
            show(mode, report[mode])
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
