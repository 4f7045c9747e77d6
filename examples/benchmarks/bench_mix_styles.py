"""Style mixing at the size of FLUX.1: time and memory of `tvbases mix-styles`, which never builds the transformer.

    python examples/benchmarks/bench_mix_styles.py [--quick] [--count 4] [--rank 32] [--method tsv] [--dtype bfloat16]

LoRA files are written with the module names and shapes of FLUX.1 (every linear layer of its 57 blocks, from diffusers'
own class on the meta device) and random factors that have a few directions in common. A process of its own mixes them.
The alternative is the dense route (projections, their product, its eigenvectors, the projected changes), which is given
one 1024 x 1024 weight of its own: its time grows with the cube of the side. With --method nothing is compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tvbases_hf.algebra.delta import LowRank, dense
from tvbases_hf.methods.devec import THRESHOLD, decompose

COMMON = 4  # directions that the styles share in every weight
QUICK = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32}


def flux_modules(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The linear layers of the transformer's blocks; nothing is allocated."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(**config)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name: (m.out_features, m.in_features) for name, m in layers if "transformer_blocks" in name}


def write_style(file: Path, seed: int, modules: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype) -> None:
    state = {}
    for number, (name, (rows, columns)) in enumerate(modules.items()):
        shared = torch.randn(rows, COMMON, generator=torch.Generator().manual_seed(number))
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + number)
        own = torch.randn(rows, rank - COMMON, generator=generator)
        state[f"transformer.{name}.lora_B.weight"] = torch.cat([shared, own], 1).to(dtype)
        state[f"transformer.{name}.lora_A.weight"] = (0.01 * torch.randn(rank, columns, generator=generator)).to(dtype)
    save_file(state, file)


def run(command: Sequence[str]) -> dict[str, float]:
    """Wall and CPU seconds and the largest resident memory of a process, mapped files included."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, error = process.communicate() if process.stderr is None else (None, process.stderr.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(error.decode())
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu, "peak": usage.ru_maxrss * unit}


def dense_route(changes: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Equations 7 to 12 of the paper as they are written, given the column spaces."""
    spaces = [torch.linalg.qr(change[:, :rank]).Q for change in changes]  # rank-r changes: any r columns span them
    chain = functools.reduce(torch.matmul, [space @ space.T for space in spaces])
    values, vectors = torch.linalg.eig(chain)
    basis = torch.linalg.qr(vectors[:, values.real > THRESHOLD].real).Q
    return [change - basis @ (basis.T @ change) for change in changes]


def one_weight(count: int, side: int, rank: int) -> dict[str, float]:
    """Our seconds against the dense route's for one square weight, and how far the results are apart."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(side, COMMON, generator=generator)
    lefts = [torch.cat([shared, torch.randn(side, rank - COMMON, generator=generator)], 1) for _ in range(count)]
    adapters = [LowRank(left, 0.01 * torch.randn(rank, side, generator=generator)) for left in lefts]
    times = []
    for _ in range(3):
        started = time.process_time()
        ours = decompose(adapters).unique
        times.append(time.process_time() - started)
    changes = [dense(adapter, torch.float32) for adapter in adapters]
    started = time.process_time()
    theirs = dense_route(changes, rank)
    plain = time.process_time() - started
    apart = max(float((dense(a) - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
    return {
        "side": side,
        "cpu_seconds": min(times),
        "dense_cpu_seconds": plain,
        "ratio": plain / min(times),
        "apart": apart,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Style mixing at the size of FLUX.1.")
    parser.add_argument("--quick", action="store_true", help="a tiny transformer and a tiny weight")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--method", help="a merging method in place of the sum of unique components")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    modules = flux_modules(QUICK if given.quick else {"guidance_embeds": True})
    rank = min(given.rank, 8) if given.quick else given.rank
    numbers = rank * sum(rows + columns for rows, columns in modules.values())
    print(f"{given.count} LoRAs of rank {rank} on {len(modules)} linear layers, {numbers / 1e6:.1f} M numbers each")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        styles = []
        for seed in range(given.count):
            write_style(work / f"{seed}.safetensors", seed, modules, rank, getattr(torch, given.dtype))
            styles += ["--style", f"style{seed}={work / f'{seed}.safetensors'}"]
        size = sum(file.stat().st_size for file in work.iterdir())
        out = work / "mixed.safetensors"
        how = ["--out", str(out), "--quiet", *(["--method", given.method] if given.method else [])]
        found = run([sys.executable, "-m", "tvbases_hf", "mix-styles", *styles, *how])
        written = out.stat().st_size
    print(
        f"mixed in {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of CPU), largest memory "
        f"{found['peak'] / 1e9:.2f} GB (files: {size / 1e9:.2f} GB in, {written / 1e9:.2f} GB out)"
    )
    result = {**found, "modules": len(modules), "rank": rank, "bytes": size}
    if given.method is None:
        result["one_weight"] = compared(given.count, 96 if given.quick else 1024, rank)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def compared(count: int, side: int, rank: int) -> dict[str, float]:
    """What the dense route costs beside ours, for one weight."""
    weight = one_weight(count, side, rank)
    print(
        f"one {weight['side']} x {weight['side']} weight: {weight['cpu_seconds']:.3g} s of CPU, the dense route "
        f"{weight['dense_cpu_seconds']:.3g} s: {weight['ratio']:.0f} times more; difference {weight['apart']:.1e}"
    )
    return weight


if __name__ == "__main__":
    main()
