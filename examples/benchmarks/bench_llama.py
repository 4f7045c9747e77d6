"""Merging at scale: base and four fine-tunes in the shapes of Llama-3.2-1B, natively and through mergekit, in turns.

    python examples/benchmarks/bench_llama.py [--quick] [--cold] [--json FILE] [--workdir DIR] [--only JOB]

Five checkpoints of 2.5 GB (bfloat16, three shards each) are written to a temporary directory and removed at the end.
Every job is a process of its own; the median of --rounds is shown, and the ratio to mergekit's own method:

* task_arithmetic and ties by mergekit, and by `tvbases merge` from the same YAML (float32 work, bfloat16 out);
* ae_bases by `tvbases merge`, and inside mergekit;
* the Gram matrix (`tvbases inspect`) and `tvbases compress`, beside plain reading of all bytes;
* the native merge on one thread, and as two processes of one thread under accelerate, with the same bytes.

Memory is what the operating system says: the peak of anonymous memory (allocated) and of resident memory, which counts
pages of mapped files too. --cold drops the page cache before every job (root only). The outputs of native and
mergekit's merges are compared: largest difference in units in the last place, and the share of numbers that differ.
Differences of 16-bit numbers have few values, and of entries equal in magnitude at its cut mergekit's ties keeps some
by a sort that is not stable: which ones depends on the machine. --stable runs it once more with a stable sort, which
keeps those that come first, as the native merge does. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TASKS = ("math", "code", "law", "chat")
SHARDS = 3
SAMPLE_SECONDS = 0.01
WORDS, STEP = 15_485_863, 15_485_867  # primes near 2^24: patterns of numbers that do not repeat together
READ = (
    "import sys\nfor path in sys.argv[1:]:\n    with open(path, 'rb', 0) as f:\n        while f.read(1 << 24): pass\n"
)
STABLE = """
import functools, sys, torch
torch.argsort = functools.partial(torch.argsort, stable=True)
from tvbases_hf.cli import main
main()
"""
RATIOS = {
    "task_arithmetic, native": "task_arithmetic, mergekit",
    "ties, native": "ties, mergekit",
    "ae_bases, native": "task_arithmetic, mergekit",
    "ae_bases in mergekit": "task_arithmetic, mergekit",
    "gram": "reading",
    "compress": "reading",
    "task_arithmetic, two processes": "task_arithmetic, one thread",
}
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": 0.2},
    "ae_bases": {"num_bases": 2, "lambda": 0.4},
}


@dataclass(frozen=True)
class Shape:
    hidden: int = 2048
    intermediate: int = 8192
    layers: int = 16
    key_value: int = 512
    vocabulary: int = 128_256

    def tensors(self) -> dict[str, tuple[int, ...]]:
        h, f, kv = self.hidden, self.intermediate, self.key_value
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in range(self.layers):
            attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
            shapes |= {f"{attention}{name}_proj.weight": (h, h) for name in "qo"}
            shapes |= {f"{attention}{name}_proj.weight": (kv, h) for name in "kv"}
            shapes |= {
                f"{mlp}gate_proj.weight": (f, h),
                f"{mlp}up_proj.weight": (f, h),
                f"{mlp}down_proj.weight": (h, f),
            }
            shapes |= {f"model.layers.{layer}.{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
        return shapes | {"model.norm.weight": (h,)}

    def config(self) -> dict[str, Any]:
        heads = self.hidden // 64
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, self.key_value // 64),
            "head_dim": 64,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


QUICK = Shape(hidden=512, intermediate=2048, layers=8, key_value=128, vocabulary=32_064)


def write_model(directory: Path, shape: Shape, seed: int) -> int:
    """A base (seed 0), or a fine-tune that differs from it by about one per cent; returns its bytes."""
    base = torch.randn(WORDS, generator=torch.Generator().manual_seed(0)) * 0.02
    step = torch.randn(STEP, generator=torch.Generator().manual_seed(seed)) * 2e-4 if seed else None
    directory.mkdir()
    names, start, total = list(shape.tensors().items()), 0, 0
    weight_map: dict[str, str] = {}
    every = sum(torch.Size(s).numel() for _, s in names)
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    for name, size in names:
        numbers = torch.Size(size).numel()
        tensor = _cut(base, start, numbers)
        if step is not None:
            tensor += _cut(step, start, numbers)
        index = min(SHARDS - 1, start * SHARDS // every)
        shards[index][name] = tensor.to(torch.bfloat16).reshape(size)
        weight_map[name] = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        start, total = start + numbers, total + 2 * numbers
    for index, shard in enumerate(shards):
        save_file(shard, directory / f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors", {"format": "pt"})
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    return total


def _cut(pattern: Tensor, start: int, count: int) -> Tensor:
    """``count`` numbers of the endlessly repeated pattern, from ``start``."""
    start %= len(pattern)
    return pattern.repeat((start + count) // len(pattern) + 1)[start : start + count]


@contextmanager
def models(shape: Shape, workdir: Path | None) -> Iterator[tuple[Path, int]]:
    root = Path(tempfile.mkdtemp(prefix="bench_llama_", dir=workdir))
    try:
        sizes = [write_model(root / name, shape, seed) for seed, name in enumerate(("base", *TASKS))]
        for method, parameters in METHODS.items():
            config = {
                "merge_method": method,
                "base_model": str(root / "base"),
                "models": [{"model": str(root / task)} for task in TASKS],
                "parameters": parameters,
                "dtype": "float32",
                "out_dtype": "bfloat16",
            }
            (root / f"{method}.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        yield root, sum(sizes)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def jobs(root: Path, out: Path) -> dict[str, list[str]]:
    tvbases = [sys.executable, "-m", "tvbases_hf"]
    tasks = [part for task in TASKS for part in ("--task", f"{task}={root / task}")]
    shared = ["--quiet", "--no-copy-tokenizer"]
    files = sorted(str(file) for name in ("base", *TASKS) for file in (root / name).glob("*.safetensors"))
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    native = lambda method: [*tvbases, "merge", str(root / f"{method}.yml"), str(out), "--quiet"]  # noqa: E731
    inside = lambda method: [*tvbases, "mergekit-yaml", str(root / f"{method}.yml"), str(out), *shared]  # noqa: E731
    stable = [sys.executable, "-c", STABLE, *inside("ties")[3:]]
    return {
        "reading": [sys.executable, "-c", READ, *files],
        "gram": [*tvbases, "inspect", "--base", str(root / "base"), *tasks, "--quiet"],
        "compress": [
            *tvbases,
            "compress",
            "--base",
            str(root / "base"),
            *tasks,
            "-m",
            "2",
            "--out",
            str(out),
            "--quiet",
        ],
        "task_arithmetic, mergekit": inside("task_arithmetic"),
        "task_arithmetic, native": native("task_arithmetic"),
        "ae_bases, native": native("ae_bases"),
        "ae_bases in mergekit": inside("ae_bases"),
        "ties, mergekit": inside("ties"),
        "ties, mergekit with a stable sort": stable,
        "ties, native": native("ties"),
        "task_arithmetic, one thread": [*native("task_arithmetic"), "--threads", "1"],
        "task_arithmetic, two processes": [
            *launch,
            "-m",
            "tvbases_hf",
            *native("task_arithmetic")[3:],
            "--threads",
            "1",
        ],
    }


def measure(command: list[str], cold: bool) -> dict[str, float]:
    """Seconds, and peaks of anonymous and resident memory in bytes, summed over the process and its children."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    started, anonymous, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            usage = [_memory(pid) for pid in _family(process.pid)]
            anonymous = max(anonymous, sum(anon for anon, _ in usage))
            resident = max(resident, sum(rss for _, rss in usage))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command} failed:\n{said.read().decode(errors='replace')}")
    return {"seconds": seconds, "anonymous": anonymous, "resident": resident}


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return tuple(1024 * int(lines[key].split()[0]) for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):  # it has ended
        return 0, 0


def difference(first: Path, second: Path) -> dict[str, float]:
    """Of two bfloat16 checkpoints: largest distance in units in the last place, share of numbers that differ."""
    ours, theirs = _tensors(first), _tensors(second)
    largest = differing = count = 0
    for name in ours:
        a, b = (_ordered(source[name](name)) for source in (ours, theirs))
        apart = (a - b).abs()
        largest, differing, count = (
            max(largest, int(apart.max())),
            differing + int((apart > 0).sum()),
            count + a.numel(),
        )
    return {"ulps": largest, "share": differing / count}


def _tensors(directory: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        handle = safe_open(str(file), framework="pt")
        found |= {name: handle.get_tensor for name in handle.keys()}  # noqa: SIM118
    return found


def _ordered(tensor: Tensor) -> Tensor:
    """Neighbouring bfloat16 numbers as neighbouring integers."""
    bits = tensor.reshape(-1).view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of 120 MB instead of 2.5 GB")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every job (root only)")
    parser.add_argument("--stable", action="store_true", help="compare ties with mergekit's under a stable sort too")
    parser.add_argument("--rounds", type=int, default=1, help="how often every job is run, in turns")
    parser.add_argument("--only", action="append", default=[], help="a job to run; repeat")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="where the models are put; by default the system's temporary one")
    options = parser.parse_args(arguments)
    console = Console(width=120)
    with models(QUICK if options.quick else Shape(), options.workdir) as (root, total):
        found: dict[str, list[dict[str, float]]] = {}
        kept: dict[str, Path] = {}
        for _ in range(options.rounds):
            for index, (job, command) in enumerate(jobs(root, root / "out").items()):
                if (options.only and job not in options.only) or ("stable" in job and not options.stable):
                    continue
                found.setdefault(job, []).append(measure(command, options.cold))
                if (root / "out").is_dir():
                    kept[job] = root / f"out{index}"
                    shutil.rmtree(kept[job], ignore_errors=True)
                    (root / "out").rename(kept[job])
        report: dict[str, Any] = {"bytes": total, "cold": options.cold, "jobs": summary(found), "equal": {}}
        for one, other in [*RATIOS.items(), ("ties, native", "ties, mergekit with a stable sort")]:
            if one in kept and other in kept and one.split(",")[0] == other.split(",")[0]:
                report["equal"][f"{one} / {other}"] = difference(kept[one], kept[other])
    show(report, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and the ratio of seconds to the job that each is compared with."""
    rows = {job: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for job, runs in found.items()}
    for job, other in RATIOS.items():
        if job in rows and other in rows:
            rows[job]["ratio"] = rows[job]["seconds"] / rows[other]["seconds"]
    return rows


def show(report: dict[str, Any], console: Console) -> None:
    state = "cold" if report["cold"] else "warm"
    title = f"base and {len(TASKS)} fine-tunes, {report['bytes'] / 1e9:.1f} GB in all, {state}"
    table = Table("job", "seconds", "ratio", "anonymous MB", "resident MB", title=title, title_justify="left")
    for job, row in report["jobs"].items():
        ratio = f"{row['ratio']:.2f} x {RATIOS[job]}" if "ratio" in row else ""
        table.add_row(
            job, f"{row['seconds']:.1f}", ratio, f"{row['anonymous'] / 1e6:.0f}", f"{row['resident'] / 1e6:.0f}"
        )
    console.print(table)
    for pair, apart in report["equal"].items():
        console.print(
            f"{pair}: {apart['ulps']} units in the last place at most, {apart['share']:.2%} of the numbers differ"
        )


if __name__ == "__main__":
    main()
