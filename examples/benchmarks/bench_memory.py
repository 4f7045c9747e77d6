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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

TASKS = ("math", "code", "law")
SAMPLE_SECONDS = 0.003
VOCABULARY = 512
START = "import tvbases_hf, torch, safetensors.torch; tvbases_hf.TaskVectors, tvbases_hf.Basis"
LOAD = """
import sys
from safetensors.torch import load_file
models = [{n: t.clone() for n, t in load_file(f"{path}/model.safetensors").items()} for path in sys.argv[1:]]
"""
GRAM = """
import sys
from tvbases_hf import TaskVectors, gram_matrix
print(gram_matrix(TaskVectors.open(sys.argv[1], {p: p for p in sys.argv[2:]})).norms)
"""


@dataclass(frozen=True)
class Layout:
    name: str
    hidden: int
    intermediate: int
    layers: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """A Llama model's tensors; the norms, which are vectors, as one row."""
        shapes = {"model.embed_tokens.weight": (VOCABULARY, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"{prefix}self_attn.{name}.weight"] = (self.hidden, self.hidden)
            for name in ("gate_proj", "up_proj"):
                shapes[f"{prefix}mlp.{name}.weight"] = (self.intermediate, self.hidden)
            shapes[f"{prefix}mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}{name}.weight"] = (1, self.hidden)
        return shapes | {"model.norm.weight": (1, self.hidden), "lm_head.weight": (VOCABULARY, self.hidden)}

    @property
    def nbytes(self) -> int:
        return 2 * sum(rows * columns for rows, columns in self.shapes().values())

    @property
    def largest(self) -> int:
        return 2 * max(rows * columns for rows, columns in self.shapes().values())

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


FULL = (
    Layout("many small tensors", 1024, 2816, 42),
    Layout("few large tensors", 8192, 10752, 1),
    Layout("twice as many small", 1024, 2816, 84),
)
QUICK = (Layout("many small tensors", 512, 1408, 20), Layout("few large tensors", 2816, 4096, 1))


def write_models(layout: Layout, directory: Path) -> list[Path]:
    """Base and fine-tunes; the fine-tunes differ from the base by about a per cent."""
    numbers = 1 << 20
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(numbers, generator=generator)
    steps = [0.01 * torch.randn(numbers, generator=generator) for _ in TASKS]
    paths = []
    for name, step in zip(("base", *TASKS), (torch.zeros(numbers), *steps), strict=True):
        path = directory / name
        path.mkdir()
        pattern = (block + step).bfloat16()
        state = {n: _repeat(pattern, shape, i) for i, (n, shape) in enumerate(layout.shapes().items())}
        state = {n: t[0] if n.endswith("norm.weight") else t for n, t in state.items()}
        save_file(state, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(layout.config()), encoding="utf-8")
        paths.append(path)
    return paths


def _repeat(pattern: Tensor, shape: tuple[int, int], shift: int) -> Tensor:
    size = shape[0] * shape[1]
    times = -(-size // len(pattern))
    return pattern.roll(7919 * shift).repeat(times)[:size].reshape(shape)


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


def peak_memory(command: list[str]) -> tuple[int, float]:
    """Largest RssAnon of the process in bytes, and its seconds; its output is shown if it fails."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, _rss_anon(status))
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command} failed:\n{said.read().decode(errors='replace')}")
    return peak, time.perf_counter() - start


def _rss_anon(status: Path) -> int:
    try:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):  # the process has ended
        return 0
    return int(line.split()[1]) * 1024


@contextmanager
def models_of(layout: Layout, workdir: Path | None) -> Iterator[tuple[list[Path], Path]]:
    """The four models and a place for an output, removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="bench_memory_", dir=workdir))
    needed = 6 * layout.nbytes
    try:
        if shutil.disk_usage(directory).free < needed:
            raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {directory}; give another place with --workdir")
        yield write_models(layout, directory), directory / "out"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure(layout: Layout, workdir: Path | None = None, jobs: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """Peak and seconds of every job on one layout."""
    results = []
    with models_of(layout, workdir) as (paths, out):
        for job, command in commands(paths, out).items():
            if jobs is not None and job not in jobs:
                continue
            peak, seconds = peak_memory(command)
            results.append({"layout": layout.name, "job": job, "peak": peak, "seconds": seconds})
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
    for layout in QUICK if options.quick else FULL:
        found = measure(layout, options.workdir)
        start_up = next(row["peak"] for row in found if row["job"] == "start-up")
        loaded = next(row["peak"] for row in found if row["job"] == "load") - start_up
        title = (
            f"{layout.name}: 4 models of {layout.nbytes / 1e9:.2f} GB, {len(layout.shapes())} tensors, "
            f"the largest {layout.largest / 1e6:.0f} MB"
        )
        table = Table(
            "job", "seconds", "peak MB", "above start-up MB", "share of load", title=title, title_justify="left"
        )
        for row in found:
            above = row["peak"] - start_up
            row |= {"model_bytes": layout.nbytes, "largest_tensor_bytes": layout.largest, "above_start_up": above}
            share = f"{above / loaded:.1%}"
            table.add_row(row["job"], f"{row['seconds']:.1f}", f"{row['peak'] / 1e6:.0f}", f"{above / 1e6:.0f}", share)
        console.print(table)
        results += found
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
