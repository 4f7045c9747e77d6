"""Peak memory: of models of a gigabyte and more, how much is in memory at once, and what decides it.

    python examples/benchmarks/bench_memory.py [--quick] [--json FILE] [--workdir DIR]

A base and three fine-tunes in the shape of a Llama model, bfloat16, are written to a temporary directory three times:
many small tensors, the same bytes in few large ones, and twice as many small ones. Every job runs in a process of its
own, whose anonymous memory (RssAnon in /proc/PID/status: what it has allocated; mapped files can be dropped at any
time and do not count) is read every few milliseconds. The start-up of Python and torch is measured too and subtracted
in the last columns. `load` is the usual way to start: every model read with safetensors' load_file and kept in memory.

mergekit collects what it has merged up to --out-shard-size before it writes it; that is set to 50M numbers here, so
that the figures show the methods and not that buffer. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama import Shape, write_model
from processes import measure
from rich.console import Console
from rich.table import Table

TASKS = ("math", "code", "law")
START = "import tvbases_hf, torch, safetensors.torch; tvbases_hf.Vectors, tvbases_hf.Basis"
LOAD = """
import sys
from pathlib import Path
from safetensors.torch import load_file
files = [file for path in sys.argv[1:] for file in Path(path).glob("*.safetensors")]
models = [{n: t.clone() for n, t in load_file(file).items()} for file in files]
"""
GRAM = """
import sys
from tvbases_hf import Vectors, gram_matrix
print(gram_matrix(Vectors.open(sys.argv[1], {p: p for p in sys.argv[2:]})).norms)
"""


def _shape(hidden: int, intermediate: int, layers: int) -> Shape:
    return Shape(hidden, intermediate, layers, key_value=hidden, vocabulary=512, tied=False)


FULL = {
    "many small tensors": _shape(1024, 2816, 42),
    "few large tensors": _shape(8192, 10752, 1),
    "twice as many small": _shape(1024, 2816, 84),
}
QUICK = {"many small tensors": _shape(512, 1408, 20), "few large tensors": _shape(2816, 4096, 1)}


def commands(paths: list[Path], out: Path) -> dict[str, list[str]]:
    """What is measured, as a user would start it."""
    base, tasks = paths[0], paths[1:]
    python = [sys.executable, "-c"]
    tvbases = [sys.executable, "-m", "tvbases_hf"]
    models = [argument for path in tasks for argument in ("--task", f"{path.name}={path}")]
    shared = ["--quiet", "--no-copy-tokenizer", "--out-shard-size", "50M"]
    configs = {
        name: _config(out.with_name(f"{name}.yml"), name, base, tasks) for name in ("task_arithmetic", "ae_bases")
    }
    return {
        "start-up": [*python, START],
        "load": [*python, LOAD, *map(str, paths)],
        "gram": [*python, GRAM, *map(str, paths)],
        "compress": [*tvbases, "compress", "--base", str(base), *models, "-m", "2", "--out", str(out), "--quiet"],
        "ae_bases in mergekit": [*tvbases, "mergekit-yaml", str(configs["ae_bases"]), str(out), *shared],
        "mergekit's own method": [*tvbases, "mergekit-yaml", str(configs["task_arithmetic"]), str(out), *shared],
    }


def _config(file: Path, method: str, base: Path, tasks: list[Path]) -> Path:
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(path)} for path in tasks],
        "parameters": {"num_bases": 2, "lambda": 0.4} if method == "ae_bases" else {"weight": 0.4},
        "dtype": "bfloat16",
    }
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return file


@contextmanager
def models_of(shape: Shape, workdir: Path | None) -> Iterator[tuple[list[Path], Path]]:
    """The four models and a place for an output, removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="bench_memory_", dir=workdir))
    needed = 6 * shape.nbytes
    try:
        if shutil.disk_usage(directory).free < needed:
            raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {directory}; give another place with --workdir")
        paths = [directory / name for name in ("base", *TASKS)]
        for seed, path in enumerate(paths):
            write_model(path, shape, seed, shards=1)
        yield paths, directory / "out"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measured(shape: Shape, workdir: Path | None = None) -> dict[str, dict[str, float]]:
    """Seconds and peaks of every job on models of one shape."""
    results = {}
    with models_of(shape, workdir) as (paths, out):
        for job, command in commands(paths, out).items():
            results[job] = measure(command)
            shutil.rmtree(out, ignore_errors=True)
    return results


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of about 100 MB instead of 1 and 2 GB")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="where the models are put; by default the system's temporary one")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/status").exists():
        raise SystemExit("this benchmark reads /proc and needs Linux")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the models are removed then too
    console = Console(width=110)
    results = []
    for name, shape in (QUICK if options.quick else FULL).items():
        found, largest = measured(shape, options.workdir), 2 * max(shape.sizes)
        start_up = found["start-up"]["anonymous"]
        loaded = found["load"]["anonymous"] - start_up
        title = (
            f"{name}: 4 models of {shape.nbytes / 1e9:.2f} GB, {len(shape.sizes)} tensors, the largest "
            f"{largest / 1e6:.0f} MB"
        )
        table = Table(
            "job", "seconds", "peak MB", "above start-up MB", "share of load", title=title, title_justify="left"
        )
        for job, row in found.items():
            peak, seconds = row["anonymous"], row["seconds"]
            above = peak - start_up
            figures = {"peak": peak, "seconds": seconds, "above_start_up": above}
            results.append(
                {"layout": name, "job": job, "model_bytes": shape.nbytes, "largest_tensor_bytes": largest} | figures
            )
            share = f"{above / loaded:.1%}"
            table.add_row(job, f"{seconds:.1f}", f"{peak / 1e6:.0f}", f"{above / 1e6:.0f}", share)
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
