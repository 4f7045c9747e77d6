"""A GPU: does every command with --device give what the CPU gives, and how fast is it? One table, under eight minutes.

    python examples/benchmarks/bench_gpu.py [--device cuda] [--quick] [--json FILE]

First each command runs on models of a few layers, on the CPU and on the device, and all that it writes and reports is
compared: the relative difference (Frobenius norm) has to be at most 1e-4, or one unit of the dtype that is written.
Then seconds: the Gram matrix, compression and merges of a base and four fine-tunes in shapes of Llama-3.2-1B, on the
CPU with all its threads and on the device, both from files that have been read before; and TSV-Merge of eight tasks,
DeVec and Iso-C on every layer shape of Llama-3-8B, beside torch's full SVDs on the same device (see bench_layers.py).
--quick: tiny shapes. --device cpu compares the CPU with itself, which tries the script.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_layers
import torch
import yaml
from llama import LLAMA_8B, Shape, write_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from tvbases_hf import Vectors, gram_matrix
from tvbases_hf.cli.app import app
from tvbases_hf.storage.run import find_device

TASKS, TOLERANCE = 4, 1e-4
SMALL = Shape(hidden=768, intermediate=1536, layers=2, key_value=256, vocabulary=2000)
TINY = Shape(hidden=64, intermediate=128, layers=1, key_value=32, vocabulary=100, head=16)
TIMED = Shape(hidden=2048, intermediate=8192, layers=4, key_value=512, vocabulary=32_000)
MERGES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"density": 0.3},
    "tsv": {},
    "tsv_compress": {},
    "iso_c": {},
    "devec_unique": {"rank": 0.25},
    "ae_bases": {"num_bases": 2},
    "ae_bases, iso_c": {"num_bases": 2, "merge": "iso_c"},
}
TIMED_MERGES = ("task_arithmetic", "ties", "tsv", "iso_c")


class Models:
    """A base and its fine-tunes in a directory, and the commands on them."""

    def __init__(self, root: Path, shape: Shape) -> None:
        self.root, self.shape = root, shape
        root.mkdir()
        for seed in range(TASKS + 1):
            write_model(root / f"m{seed}", shape, seed, shards=1)
        self.tasks = {f"t{seed}": root / f"m{seed}" for seed in range(1, TASKS + 1)}

    @property
    def named(self) -> list[str]:
        return ["--base", str(self.root / "m0"), *(f"--task={name}={path}" for name, path in self.tasks.items())]

    def config(self, name: str) -> Path:
        """The mergekit YAML of one of MERGES."""
        file = self.root / f"{name.replace(', ', '-')}.yml"
        models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in self.tasks.values()]
        if name.startswith("ae_bases"):
            models = [{"model": model["model"]} for model in models]
        written = {"merge_method": name.partition(",")[0], "base_model": str(self.root / "m0"), "models": models}
        written |= {"parameters": MERGES[name], "dtype": "float32"}
        file.write_text(yaml.safe_dump(written), encoding="utf-8")
        return file

    def commands(self) -> Iterator[tuple[str, Callable[[Path], list[str]]]]:
        """(name, arguments that write into a directory) of every command that takes --device."""
        for name in MERGES:
            yield f"merge: {name}", lambda out, name=name: ["merge", str(self.config(name)), str(out)]
        yield "inspect", lambda out: ["inspect", *self.named, "--layers", "--json", f"{out}.json"]
        for method in ("ae", "tsv", "masks"):
            yield f"compress: {method}", lambda out, m=method: [*self._written("compress", out), "--method", m]
        yield "decompose", lambda out: self._written("decompose", out)
        yield "extract", lambda out: ["extract", *self.named[:2], self.named[2], "--out", str(out), "--rank", "8"]

    def _written(self, command: str, out: Path) -> list[str]:
        return [command, *self.named, "--out", str(out)]


def call(arguments: Sequence[str], device: str) -> float:
    """Seconds of ``tvbases`` with these arguments, in this process."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = app([*arguments, "--device", device, "--quiet"], standalone_mode=False)
    if code:
        raise SystemExit(f"tvbases {' '.join(arguments)} --device {device} failed")
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def written(out: Path) -> dict[str, torch.Tensor]:
    """Whatever a command has left: tensors of its files, and the numbers of its report in their order."""
    found = {}
    for file in sorted(out.rglob("*.safetensors")) if out.is_dir() else ():
        found |= {f"{file.relative_to(out)}:{name}": tensor for name, tensor in load_file(file).items()}
    report = Path(f"{out}.json")
    if report.is_file():
        found["report"] = torch.tensor(list(_numbers(json.loads(report.read_text(encoding="utf-8")))))
    return found


def _numbers(report: Any) -> Iterator[float]:
    if isinstance(report, Mapping | list):
        for part in report.values() if isinstance(report, Mapping) else report:
            yield from _numbers(part)
    elif isinstance(report, float):
        yield report


def difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The largest relative difference of two tensors of one name, in units of what their dtype allows."""
    if first.keys() != second.keys() or not first:
        raise SystemExit(f"other tensors are written: {sorted(first.keys() ^ second.keys())[:3]}")
    worst = 0.0
    for name, tensor in first.items():
        a, b = tensor.double(), second[name].double()
        coarse = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        apart = float((a - b).norm() / b.norm().clamp_min(1e-30))
        worst = max(worst, apart / max(TOLERANCE, coarse) * TOLERANCE)
    return worst


def equality(models: Models, device: str) -> list[dict[str, Any]]:
    rows = []
    for name, arguments in models.commands():
        outs = [models.root / f"out-{len(rows)}-{place}" for place in ("cpu", "device")]
        for out, place in zip(outs, ("cpu", device), strict=True):
            call(arguments(out), place)
        rows.append({"command": name, "difference": difference(written(outs[1]), written(outs[0]))})
    return rows


def timings(models: Models, device: str) -> list[dict[str, Any]]:
    """Seconds on the CPU and on the device, each once after a first run on the device that starts libraries up."""
    works: dict[str, Callable[[Path], list[str]]] = {
        f"merge: {name}": lambda out, name=name: ["merge", str(models.config(name)), str(out)] for name in TIMED_MERGES
    }
    works["compress: ae"] = lambda out: ["compress", *models.named, "--out", str(out), "--method", "ae"]
    rows = [{"work": "Gram matrix"} | {place: _gram(models, place) for place in (device, "cpu")}]
    for name, arguments in works.items():
        seconds = {
            place: call(arguments(models.root / f"timed-{len(rows)}-{index}"), place)
            for index, place in enumerate((device, "cpu"))
        }
        rows.append({"work": name} | seconds)
    return [{"work": row["work"], "device": row[device], "cpu": row["cpu"]} for row in rows]


def _gram(models: Models, device: str) -> float:
    gram_matrix(Vectors.open(models.root / "m0", models.tasks, device=device))  # files are in memory afterwards
    started = time.perf_counter()
    gram_matrix(Vectors.open(models.root / "m0", models.tasks, device=device))
    return time.perf_counter() - started


def layers(shape: Shape, device: str, count: int) -> list[dict[str, Any]]:
    rows = []
    for layer, (height, width, number) in bench_layers.matrices(shape).items():
        if layer == "embedding" and device == "cpu":
            continue
        tasks = bench_layers.make_tasks(count, height, width, device)
        for method, row in bench_layers.compare(tasks).items():
            rows.append({"layer": f"{layer} {height} x {width}", "number": number, "method": method} | row)
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    find_device(options.device)  # one line if it is not there
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        small = Models(root / "small", TINY if options.quick else SMALL)
        report: dict[str, Any] = {"device": options.device, "equality": equality(small, options.device)}
        timed = small if options.quick else Models(root / "timed", TIMED)
        report["timings"] = timings(timed, options.device)
    shape, count = (TINY, 4) if options.quick else (LLAMA_8B, 8)
    report["layers"] = layers(shape, options.device, count)
    report["seconds"] = time.perf_counter() - began
    show(report, Console(width=110))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if any(not row["difference"] <= TOLERANCE for row in report["equality"]):
        raise SystemExit("a command gives another result on the device")
    return report


def show(report: Mapping[str, Any], console: Console) -> None:
    place = report["device"]
    table = Table("what", place, "beside", "ratio", title=f"{place} against the CPU; {report['seconds']:.0f} s in all")
    for row in report["equality"]:
        table.add_row(row["command"], "", f"difference {row['difference']:.0e}", "")
    for row in report["timings"]:
        ratio = row["cpu"] / row["device"]
        table.add_row(row["work"], f"{row['device']:.2f} s", f"CPU {row['cpu']:.2f} s", f"{ratio:.1f}")
    for row in report["layers"]:
        theirs = row["reference_seconds"]
        beside = ("", "") if theirs is None else (f"full SVDs {theirs:.2f} s", f"{row['ratio']:.1f}")
        table.add_row(f"{row['method']}, {row['layer']}", f"{row['seconds']:.2f} s", *beside)
    console.print(table)


if __name__ == "__main__":
    main()
