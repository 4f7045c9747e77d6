"""Online bases: memory and disk while fifty tasks go through a buffer of five vectors, and what methods make of it.

    python examples/benchmarks/bench_online.py [--quick] [--json FILE] [--workdir DIR]

A base and ten fine-tunes in bfloat16 are written to a temporary directory; each fine-tune comes five times, under five
names. Every method runs in a process of its own. Memory is its anonymous memory (RssAnon in /proc/self/status: what it
has allocated; mapped files can be dropped at any time and do not count), read every few milliseconds while a task is
added, minus that before the first. The last columns compare the merged vector with the sum of all fifty task vectors,
and the reconstruction of the tasks with the tasks. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from tvbases_hf.algebra.delta import dense
from tvbases_hf.basis.online import OnlineBasis
from tvbases_hf.storage.checkpoint import Checkpoint

TASKS, BUDGET, DISTINCT = 50, 5, 10
METHODS = ("ae", "rand_select", "ta", "magmax", "ties", "opcm")
SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Step:
    tasks: int
    seconds: float
    peak: int
    vectors: int
    config: int


def write_models(directory: Path, layers: int, width: int) -> list[Path]:
    """The base and the fine-tunes, which differ from it by about a per cent and have a direction in common."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.{part}": (width, width) for i in range(layers) for part in ("q.weight", "o.weight")}

    def normal() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base, shared = normal(), normal()
    states = [base]
    for _ in range(DISTINCT):
        own = normal()
        states.append({name: base[name] + 0.01 * own[name] + 0.005 * shared[name] for name in shapes})
    paths = [directory / f"model{index:02}" for index in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        path.mkdir()
        save_file({name: tensor.bfloat16() for name, tensor in state.items()}, path / "model.safetensors")
    return paths


def anonymous_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The largest anonymous memory of this process while the block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = anonymous_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def run(method: str, paths: list[Path], out: Path) -> tuple[list[Step], OnlineBasis]:
    """All tasks added, and what each addition took."""
    online = OnlineBasis.create(out, paths[0], BUDGET if method in ("ae", "rand_select") else 1, method=method)
    before, steps = anonymous_memory(), []
    for index in range(TASKS):
        start = time.perf_counter()
        with Peak() as peak:
            online.add(f"task{index}", paths[1 + index % DISTINCT])
        size = {file.name: file.stat().st_size for file in out.iterdir()}
        seconds = time.perf_counter() - start
        vectors, config = size["basis.safetensors"], size["basis_config.json"]
        steps.append(Step(index + 1, seconds, peak.bytes - before, vectors, config))
    return steps, online


def quality(online: OnlineBasis, paths: list[Path]) -> dict[str, float]:
    """Relative distance of the merged vector from the sum of all tasks, best scaled; mean error of the tasks."""
    base, models = Checkpoint.open(paths[0]), [Checkpoint.open(path) for path in paths[1:]]
    change, decoder = online.merged(), online.basis.decoder
    inner = torch.zeros(3, dtype=torch.float64)
    lost, norms = torch.zeros(TASKS, dtype=torch.float64), torch.zeros(TASKS, dtype=torch.float64)
    for name in base.tensors:
        origin = base.read(name).double()
        taus = [model.read(name).double() - origin for model in models]
        total = sum(taus, torch.zeros_like(origin)) * (TASKS / DISTINCT)
        merged = dense(change(name))
        inner += torch.stack([(merged * total).sum(), merged.square().sum(), total.square().sum()])
        parts = torch.stack([dense(part) for part in online.basis.deltas(name)])
        for index in range(TASKS):
            tau = taus[index % DISTINCT]
            lost[index] += (torch.tensordot(decoder[:, index], parts, dims=1) - tau).square().sum()
            norms[index] += tau.square().sum()
    cosine = float(inner[0] / (inner[1] * inner[2]).sqrt())
    return {"cosine with the sum": cosine, "error of a task": float((lost / norms).sqrt().mean())}


def measure(method: str, directory: Path) -> dict[str, Any]:
    """One method, in a process of its own."""
    command = [sys.executable, __file__, "--method", method, "--workdir", str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measured(method: str, directory: Path) -> dict[str, Any]:
    """In that process: what every addition took, and how good the result is."""
    paths = sorted(directory.glob("model*"))
    steps, online = run(method, paths, directory / method)
    return {"method": method, **quality(online, paths), "steps": [asdict(step) for step in steps]}


def row(found: dict[str, Any]) -> list[str]:
    steps = found["steps"]
    seconds = sum(step["seconds"] for step in steps[BUDGET:]) / (len(steps) - BUDGET)
    peaks = [max(step["peak"] for step in part) for part in (steps[5:10], steps[-5:])]
    return [
        found["method"],
        f"{seconds:.2f}",
        *(f"{steps[index]['vectors'] / 1e6:.1f}" for index in (BUDGET - 1, -1)),
        *(f"{peak / 1e6:.1f}" for peak in peaks),
        f"{steps[-1]['config'] / 1e3:.1f}",
        f"{found['cosine with the sum']:.3f}",
        f"{found['error of a task']:.3f}",
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of 2 MB instead of 25 MB")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="where the models are put; by default the system's temporary one")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not Path("/proc/self/status").exists():
        raise SystemExit("this benchmark reads /proc and needs Linux")
    if options.method:
        print(json.dumps(measured(options.method, options.workdir)))
        return []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the models are removed then too
    directory = Path(tempfile.mkdtemp(prefix="bench_online_", dir=options.workdir))
    try:
        paths = write_models(directory, *((2, 512) if options.quick else (6, 1024)))
        size = (paths[0] / "model.safetensors").stat().st_size
        results = []
        for method in METHODS:
            results.append(measure(method, directory))
            shutil.rmtree(directory / method)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    title = f"{TASKS} tasks of {size / 1e6:.1f} MB through {BUDGET} vectors (running merges: one)"
    table = Table(title=title, title_justify="left")
    for heading in (
        "method",
        "s a task",
        "MB at 5",
        "MB at 50",
        "peak at 6-10",
        "at 46-50",
        "config kB",
        "sum",
        "task",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for found in results:
        table.add_row(*row(found))
    console = Console(width=118)
    console.print(table)
    console.print(
        "MB: vectors on disk; peak: memory in MB; sum: cosine of the merged vector with the sum of all tasks; "
        "task: mean relative error of a reconstruction"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
