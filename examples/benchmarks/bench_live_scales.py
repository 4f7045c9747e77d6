"""Other scales for styles that are mixed by a merging method, at the size of FLUX.1: what a slider waits for.

    python examples/benchmarks/bench_live_scales.py [--quick] [--count 4] [--rank 32] [--method iso_c] [--repeats 3]

The LoRAs are those of bench_mix_styles.py. The factors of an adapter in bfloat16 are there, the transformer is not.
Measured is what ``StyleMix.set_style_scales`` does to all weights, beside making every merge anew in the factors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_mix_styles import QUICK, flux_modules, write_style
from tqdm import tqdm

from tvbases_diffusers.live import Remade, live
from tvbases_hf.methods.devec import Options
from tvbases_hf.storage.parallel import for_all
from tvbases_hf.styles.mixing import Styles, recipe_of, split

METHODS = ("tsv", "iso_c", "iso_cts")
SCALES = (0.9, 0.8, 1.1, 0.6)


class Adapter:
    """All weights of a mix, and the factors that a pipeline would have."""

    def __init__(self, styles: Styles, method: str) -> None:
        recipe = recipe_of(None, Options(), method=method)
        self.names, begun = styles.names, dict.fromkeys(styles.names, 1.0)
        self.weights, self.anew, self.factors = list[Remade](), list[Remade](), []
        for part in tqdm(split(styles, recipe), f"Mixing by {method}", len(styles.places), disable=None):
            rank = recipe.rank(part.place)
            weight = live(part, begun, rank)
            made = [tensor.to(torch.bfloat16) for tensor in weight.factors(begun).values()]
            self.factors.append(SimpleNamespace(first=made[0], second=made[1]))
            self.weights.append(weight)
            self.anew.append(Remade(part, rank))

    def seconds(self, weights: Sequence[Remade], scales: dict[str, float]) -> dict[str, float]:
        """Wall and processor seconds to check the scales and to write them."""
        wall, busy = time.perf_counter(), time.process_time()
        for_all(weights, lambda weight: weight.check(scales, torch.bfloat16))
        both = list(zip(weights, self.factors, strict=True))
        for_all(both, lambda pair: pair[0].write(pair[1], scales, set(scales)))
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - busy}


def measured(styles: Styles, method: str, repeats: int) -> dict[str, Any]:
    adapter = Adapter(styles, method)
    moved = [dict(zip(adapter.names, (s + 0.01 * turn for s in SCALES), strict=False)) for turn in range(repeats)]
    ours = min((adapter.seconds(adapter.weights, scales) for scales in moved), key=lambda found: found["cpu_seconds"])
    anew = adapter.seconds(adapter.anew, moved[0])
    return {**ours, "anew_seconds": anew["seconds"], "anew_cpu_seconds": anew["cpu_seconds"]}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Other scales for mixed styles, at the size of FLUX.1.")
    parser.add_argument("--quick", action="store_true", help="a tiny transformer")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--method", action="append", help=f"repeat; default: {', '.join(METHODS)}")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    modules, rank = flux_modules(QUICK if given.quick else {"guidance_embeds": True}), given.rank
    rank = min(rank, 8) if given.quick else rank
    with tempfile.TemporaryDirectory() as name:
        files = {f"style{seed}": Path(name) / f"{seed}.safetensors" for seed in range(given.count)}
        for seed, file in enumerate(files.values()):
            write_style(file, seed, modules, rank, torch.bfloat16)
        styles = Styles.open({style: str(file) for style, file in files.items()})
        found = {method: measured(styles, method, given.repeats) for method in given.method or METHODS}
    print(f"{given.count} LoRAs of rank {rank} on {len(modules)} weights, {torch.get_num_threads()} threads")
    for method, row in found.items():
        print(
            f"{method:>16}: {row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s of CPU), every merge anew "
            f"{row['anew_seconds']:.2f} s ({row['anew_cpu_seconds']:.2f}): "
            f"{row['anew_cpu_seconds'] / row['cpu_seconds']:.1f} times the CPU"
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
