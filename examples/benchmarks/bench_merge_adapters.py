"""Merging LoRA adapters with `tvbases merge`, next to mergekit's route through full models: time and memory.

    python examples/benchmarks/bench_merge_adapters.py [--model 1B | 8B] [--quick] [--mergekit] [--json FILE]

The base has the shapes of Llama-3.2-1B (1.2 billion parameters, bfloat16) and random weights; eight adapters of rank 16
change all its attention and MLP matrices. Every merge is a process of its own. "anonymous" is the most memory that it
had for itself (RssAnon of /proc/PID/status, asked every few milliseconds; Linux only), "resident" the kernel's own
record, mapped files included; "CPU seconds" leave out what other processes take. mergekit builds every model in full
first, which needs 25 GB of disk for a base of this size: it is compared with --quick (4 small layers), and at full size
with --mergekit. With --model 8B (the shapes of Llama-3-8B) adapters come out, and of the base, whose numbers nothing
needs then, only the files' headers are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tvbases_hf.storage.checkpoint import TensorInfo
from tvbases_hf.storage.tensor_files import TensorFiles

ADAPTERS, RANK = 8, 16
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PAUSE = 0.004
STOCK = "from mergekit.scripts.run_yaml import main; main()"


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def module(self, name: str) -> tuple[int, int]:
        """[out, in] of one linear layer."""
        key_value = self.hidden * self.key_value_heads // self.heads
        rows = {"k_proj": key_value, "v_proj": key_value, "gate_proj": self.intermediate, "up_proj": self.intermediate}
        columns = {"down_proj": self.intermediate}
        last = name.split(".")[-1]
        return rows.get(last, self.hidden), columns.get(last, self.hidden)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found |= {f"{prefix}.{name}.weight": self.module(name) for name in MODULES}
            found |= {
                f"{prefix}.{name}.weight": (self.hidden,) for name in ("input_layernorm", "post_attention_layernorm")
            }
        return found | {"model.norm.weight": (self.hidden,)}


FULL = Shape(hidden=2048, intermediate=8192, layers=16, heads=32, key_value_heads=8, vocabulary=128256)
LARGE = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, key_value_heads=8, vocabulary=128256)
MODELS = {"1B": FULL, "8B": LARGE}
QUICK = Shape(hidden=512, intermediate=2048, layers=4, heads=8, key_value_heads=2, vocabulary=8192)


def make_base(directory: Path, shape: Shape, empty: bool = False) -> None:
    """Random bfloat16 weights, written one at a time, and the configuration of a Llama with tied embeddings.

    ``empty``: files with a hole where the numbers would be.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    infos = {name: TensorInfo(size, torch.bfloat16) for name, size in shape.tensors().items()}
    files, generator = TensorFiles(directory, "model", infos), torch.Generator().manual_seed(0)
    for name, info in infos.items() if not empty else ():
        files.write(name, torch.empty(info.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))


def make_adapter(directory: Path, base: Path, shape: Shape, seed: int) -> None:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(shape.layers):
        for name in MODULES:
            rows, columns = shape.module(name)
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 1e-3
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    config |= {"target_modules": [name.split(".")[-1] for name in MODULES], "base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@dataclass(frozen=True)
class Measured:
    """One process: seconds on the clock and of the processors, and megabytes at their highest."""

    seconds: float
    cpu_seconds: float
    anonymous: float
    resident: float


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end, watching its memory. Raises RuntimeError if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as log:
        started, peak = time.monotonic(), 0
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, anonymous_kilobytes(process.pid))
            time.sleep(PAUSE)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read().decode()}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak / 1e3, usage.ru_maxrss / 1e3)


def anonymous_kilobytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


class Bench:
    """A base and its adapters in a scratch directory; ``run`` merges them in a process of its own."""

    def __init__(self, scratch: Path, shape: Shape) -> None:
        self.scratch, self.base = scratch, scratch / "base"
        self.base.mkdir()
        make_base(self.base, shape, empty=shape is LARGE)
        self.adapters = [scratch / f"lora{index}" for index in range(ADAPTERS)]
        for seed, path in enumerate(self.adapters, 1):
            make_adapter(path, self.base, shape, seed)

    def run(self, method: str, options: Sequence[str], stock: bool = False, **parameters: Any) -> dict[str, Any]:
        weight = {} if method == "ae_bases" else {"weight": 1 / ADAPTERS}
        config = {
            "merge_method": method,
            "base_model": str(self.base),
            "models": [{"model": f"{self.base}+{path}"} for path in self.adapters],
            "parameters": {**weight, **parameters},
        }
        file, out = self.scratch / "merge.yml", self.scratch / "out"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        native = [sys.executable, "-m", "tvbases_hf", "merge", str(file), str(out), "--quiet"]
        whole = [sys.executable, "-c", STOCK, str(file), str(out), "--no-write-model-card", "--no-copy-tokenizer"]
        whole += ["--lora-merge-cache", str(self.scratch / "cache"), "--quiet"]
        found = measure([*(whole if stock else native), *options])
        size = sum(path.stat().st_size for path in out.iterdir())
        remove(out)
        remove(self.scratch / "cache")
        label = "mergekit" if stock else "tvbases merge"
        return {"command": " ".join([label, *options]), "method": method, "megabytes_out": size / 1e6, **vars(found)}


def remove(directory: Path) -> None:
    if directory.exists():
        import shutil

        shutil.rmtree(directory)


def run(scratch: Path, shape: Shape, stock: bool, report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    bench, rows = Bench(scratch, shape), []
    imports = measure([sys.executable, "-c", "import tvbases_mergekit; tvbases_mergekit.register()"])
    rows.append({"command": "(imports alone)", "method": "", "megabytes_out": 0.0, **vars(imports)})
    jobs: list[tuple[str, list[str], bool, dict[str, Any]]] = [
        ("task_arithmetic", ["--adapter"], False, {}),
        ("task_arithmetic", ["--adapter", "--rank", str(RANK)], False, {}),
        ("tsv", ["--adapter"], False, {}),
        ("iso_c", ["--adapter"], False, {}),
        ("ae_bases", ["--adapter"], False, {"num_bases": 4}),
        *([("task_arithmetic", [], False, {})] if shape is not LARGE else []),
        *([("task_arithmetic", [], True, {})] if stock else []),
        *([("ties", [], False, {"density": 0.2}), ("ties", [], True, {"density": 0.2})] if stock else []),
    ]
    for method, options, whole, parameters in jobs:
        rows.append(bench.run(method, options, whole, **parameters))
        report(rows[-1])
    return rows


def show(rows: Sequence[dict[str, Any]], shape: Shape) -> None:
    numbers = sum(int(torch.Size(size).numel()) for size in shape.tensors().values())
    title = f"{ADAPTERS} adapters of rank {RANK}, base of {numbers / 1e9:.2f} billion parameters in bfloat16"
    table = Table("command", "method", title=title, title_justify="left")
    for name in ("seconds", "CPU seconds", "anonymous, MB", "resident, MB", "written, MB"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = [row[n] for n in ("seconds", "cpu_seconds", "anonymous", "resident", "megabytes_out")]
        table.add_row(row["command"], row["method"], *(f"{figure:,.1f}" for figure in figures))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--model", choices=MODELS, default="1B", help="whose shapes the base has (default: 1B)")
    size.add_argument("--quick", action="store_true", help="a base of 4 small layers, and mergekit's route")
    parser.add_argument("--mergekit", action="store_true", help="mergekit's route at full size, too (25 GB of disk)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    shape = QUICK if options.quick else MODELS[options.model]
    if shape is LARGE and options.mergekit:
        parser.error("--mergekit needs a base with numbers; take --model 1B")
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(Path(scratch), shape, options.quick or options.mergekit, lambda row: print(f"... {row['command']}"))
    show(rows, shape)
    if options.json:
        options.json.write_text(json.dumps({"shape": vars(shape), "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
