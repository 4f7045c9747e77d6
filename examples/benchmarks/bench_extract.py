"""LoRAs from a full fine-tune: `tvbases extract` beside mergekit's own mergekit-extract-lora, at equal ranks.

    python examples/benchmarks/bench_extract.py [--quick] [--json FILE] [--workdir DIR] [--rank 16 --rank 64]

A model in the shape of a small Llama and a fine-tune of it are written in bfloat16: every matrix changes by a random
one whose singular values fall like 1 / k, by one per cent of its norm, embeddings and norms by noise. Both programs
write a LoRA of each rank, with embeddings and norms saved whole, in a process of their own. The error is that of the
product of the stored factors against the difference of the stored weights, in float64, over all matrices with factors;
`least` is what the best matrices of that rank miss, before any rounding. Memory is what was allocated at most
(RssAnon). Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from llama import Shape, write_model
from processes import measure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

FULL = Shape(1024, 2816, 8, key_value=512, vocabulary=16_384)
QUICK = Shape(256, 704, 2, key_value=128, vocabulary=1024)
# Of a matrix's own norm.
CHANGE = 0.01
SPECTRUM = 256
PREFIX = "base_model.model."


def write_fine_tune(base: Path, directory: Path) -> None:
    """A copy of the base whose matrices change with a falling spectrum."""
    directory.mkdir()
    shutil.copyfile(base / "config.json", directory / "config.json")
    generator, tensors = torch.Generator().manual_seed(1), {}
    for file in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            step = _change(tensor, generator, "embed" in name)
            size = CHANGE * float(tensor.float().norm()) / float(step.norm())
            tensors[name] = (tensor.float() + size * step).to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _change(tensor: Tensor, generator: torch.Generator, flat: bool) -> Tensor:
    if tensor.dim() < 2 or flat:
        return torch.randn(tensor.shape, generator=generator)
    rows, columns = tensor.shape
    count = min(rows, columns, SPECTRUM)
    left, right = (torch.randn(side, count, generator=generator) for side in (rows, columns))
    return (left / torch.arange(1, count + 1)) @ right.T


def commands(base: Path, tuned: Path, out: Path, rank: int) -> dict[str, tuple[list[str], Path]]:
    """Each program as a user starts it, and where its adapter is then."""
    ours = [sys.executable, "-m", "tvbases_hf", "extract", "--base", str(base), "--task", f"t={tuned}"]
    theirs = [sys.executable, "-m", "mergekit.scripts.extract_lora", "--base-model", str(base), "--model", str(tuned)]
    return {
        "mergekit-extract-lora": (
            [*theirs, "--out-path", str(out / "theirs"), "--max-rank", str(rank), "--no-copy-tokenizer"],
            out / "theirs",
        ),
        "tvbases extract": (
            [*ours, "--rank", str(rank), "--out", str(out / "ours"), "--quiet"],
            out / "ours" / "t",
        ),
    }


def error(base: Path, tuned: Path, adapter: Path | None, rank: int = 0) -> float:
    """Of the factors that an adapter stores; without one, of the best matrices of that rank."""
    factors = load_file(adapter / "adapter_model.safetensors") if adapter else {}
    start = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    lost = total = 0.0
    for name, tensor in load_file(tuned / "model.safetensors").items():
        if tensor.dim() < 2 or "embed" in name:
            continue
        change = tensor.double() - start[name].double()
        total += float(change.square().sum())
        if adapter is None:
            lost += float(torch.linalg.svdvals(change)[rank:].square().sum())
            continue
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        product = factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
        lost += float((change - product).square().sum())
    return (lost / total) ** 0.5


def _processor_seconds() -> float:
    """Of all processes that have ended; unlike the time that passes, they hardly depend on what else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(shape: Shape, ranks: list[int], workdir: Path | None) -> list[dict[str, Any]]:
    directory = Path(tempfile.mkdtemp(prefix="bench_extract_", dir=workdir))
    try:
        base, tuned = directory / "base", directory / "tuned"
        write_model(base, shape, 0, shards=1)
        write_fine_tune(base, tuned)
        found = []
        for rank in ranks:
            least = error(base, tuned, None, rank)
            for program, (command, adapter) in commands(base, tuned, directory / f"out{rank}", rank).items():
                before = _processor_seconds()
                cost = measure(command)
                row = {"rank": rank, "program": program, "error": error(base, tuned, adapter), "least": least}
                bytes_ = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
                row |= {"seconds": cost["seconds"], "processor": _processor_seconds() - before}
                found.append({**row, "memory": cost["anonymous"], "bytes": bytes_})
        return found
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of 5 MB instead of 250 MB")
    parser.add_argument("--rank", type=int, action="append", help="repeat; default: 16, 64")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="where the models are put; by default the system's temporary one")
    options = parser.parse_args(arguments)
    shape = QUICK if options.quick else FULL
    found = measured(shape, options.rank or [16, 64], options.workdir)
    title = f"a fine-tune of {shape.nbytes / 1e6:.0f} MB, {shape.hidden} wide, {shape.layers} layers, bfloat16"
    table = Table("rank", "program", "error", "above the least", "seconds", "of a processor", "memory MB", title=title)
    for row in found:
        above = row["error"] / row["least"] - 1
        cost = f"{row['seconds']:.1f}", f"{row['processor']:.1f}", f"{row['memory'] / 1e6:.0f}"
        table.add_row(str(row["rank"]), row["program"], f"{row['error']:.4%}", f"{above:.3%}", *cost)
    console = Console(width=110)
    console.print(table)
    for theirs, ours in zip(found[::2], found[1::2], strict=True):
        keys = ("error", "seconds", "processor", "memory")
        ratios = ", ".join(f"{key} {ours[key] / theirs[key]:.3f}" for key in keys)
        console.print(f"rank {ours['rank']}, ours over theirs: {ratios}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
