"""Adding T adapters up to one of rank r: tvbases_peft.add_weighted_adapter against PEFT's own, side by side.

    python examples/benchmarks/bench_add_weighted.py [--quick] [--threads N] [--json FILE]

Both add eight LoRA adapters of rank 16 with the same weights and truncate the sum to rank 16: PEFT
(combination_type="svd") decomposes the dense sum of every layer, ours never forms it. `difference` is the largest
relative Frobenius distance between the two results over the layers; `error` is what the truncation costs, as our
function returns it and as it is for PEFT's result, against the exact sum in float64. Times are of the wall clock, and
of the processor, which other programs on the machine do not change. One thread unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tvbases_peft import add_weighted_adapter

TASKS, RANK = 8, 16
OURS, THEIRS = "ours", "theirs"
REPEATS = 3


class Layers(nn.Module):
    """A stack of square linear layers; the linear algebra is all that is measured."""

    def __init__(self, layers: int, side: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(layers))


def make_model(layers: int, side: int) -> Any:
    """T adapters whose singular values decay, as those of trained ones do, and which partly agree."""
    generator = torch.Generator().manual_seed(0)
    plain: Any = Layers(layers, side)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r"layers\.\d+")
    model: Any = get_peft_model(plain, config, adapter_name="task0")
    for task in range(1, TASKS):
        model.add_adapter(f"task{task}", config)
    decay = 0.85 ** torch.arange(RANK)
    with torch.no_grad():
        for layer in model.base_model.model.layers:
            shared = torch.randn(side, RANK, generator=generator)
            for task in range(TASKS):
                own = torch.randn(side, RANK, generator=generator)
                layer.lora_A[f"task{task}"].weight.copy_(torch.randn(RANK, side, generator=generator))
                layer.lora_B[f"task{task}"].weight.copy_((0.5 * shared + own) * decay)
    return model


def seconds(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall clock, processor time, result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = action()
    return time.perf_counter() - wall, time.process_time() - processor, result


def measure(layers: int, side: int) -> dict[str, float]:
    """Time both on one model, and compare what they made."""
    model = make_model(layers, side)
    tasks = [f"task{task}" for task in range(TASKS)]
    weights = [1.0 - 0.15 * task for task in range(TASKS)]
    add_weighted_adapter(model, tasks, weights, "warm-up", rank=RANK)
    ours, error = [], 0.0
    for _ in range(REPEATS):
        if OURS in model.peft_config:
            model.delete_adapter(OURS)
        *spent, error = seconds(lambda: add_weighted_adapter(model, tasks, weights, OURS, rank=RANK))
        ours.append(spent)
    wall, processor = (min(times) for times in zip(*ours, strict=True))
    peft_wall, peft_processor, _ = seconds(
        lambda: model.base_model.add_weighted_adapter(tasks, weights, THEIRS, combination_type="svd", svd_rank=RANK)
    )
    difference, peft_error = compare(model, tasks, weights)
    return {
        "layers": layers,
        "side": side,
        "threads": torch.get_num_threads(),
        "ours_s": wall,
        "peft_s": peft_wall,
        "ratio": peft_wall / wall,
        "ours_cpu_s": processor,
        "peft_cpu_s": peft_processor,
        "ratio_cpu": peft_processor / processor,
        "difference": difference,
        "error_ours": error,
        "error_peft": peft_error,
    }


def compare(model: Any, tasks: list[str], weights: list[float]) -> tuple[float, float]:
    """The largest relative distance of the two results, and the error of PEFT's against the exact sum."""
    worst, lost, whole = 0.0, 0.0, 0.0
    for layer in model.base_model.model.layers:
        exact = sum((w * dense(layer, task) for w, task in zip(weights, tasks, strict=True)), torch.zeros(()))
        ours, theirs = dense(layer, OURS), dense(layer, THEIRS)
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
        lost += float((exact - theirs).square().sum())
        whole += float(exact.square().sum())
    return worst, (lost / whole) ** 0.5


def dense(layer: Any, adapter: str) -> Tensor:
    a, b = layer.lora_A[adapter].weight.detach().double(), layer.lora_B[adapter].weight.detach().double()
    return layer.scaling[adapter] * b @ a


def show(rows: list[dict[str, float]]) -> None:
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    table = Table(title=f"{TASKS} adapters of rank {RANK} to one of rank {RANK}, {threads}")
    columns = {
        "layers": ("layers", "d"),
        "side": ("side", "d"),
        "ours [s]": ("ours_s", ".3f"),
        "PEFT [s]": ("peft_s", ".2f"),
        "ratio": ("ratio", ".0f"),
        "CPU ours": ("ours_cpu_s", ".3f"),
        "CPU PEFT": ("peft_cpu_s", ".2f"),
        "CPU ratio": ("ratio_cpu", ".0f"),
        "difference": ("difference", ".1e"),
        "error ours": ("error_ours", ".6f"),
        "error PEFT": ("error_peft", ".6f"),
    }
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(format(row[key], form) for key, form in columns.values()))
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small layer, a few seconds")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [(1, 512)] if options.quick else [(4, 1024), (4, 2048)]
    rows = [measure(layers, side) for layers, side in sizes]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
