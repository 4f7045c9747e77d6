"""A library of many adapters: error, bytes, time and memory, beside vlora-dev and lorashare.

    python examples/benchmarks/bench_library.py [--count 1000] [--budget 0.08] [--layers 30] [--workdir DIR]
    python examples/benchmarks/bench_library.py --adapters DIR --base BASE [--budgets 0.5 0.25] [--accuracy WORKDIR]
    ... --rivals PYTHON    # of an environment with vlora-dev and lorashare: the same adapters through them
    python examples/benchmarks/bench_library.py --write RESULTS-LIBRARY.md FILE.json ...    # of runs with --json

Without --adapters, adapters with planted common subspaces in the shapes of SmolLM2-135M (planted.py) are written to the
work directory. Each program compresses all adapters but the last in a process of its own, whose memory is measured,
gives one back, and takes the last one in; ours once more at every share of the bytes that a rival comes to. Errors are
means over the adapters of the squared relative error of what comes back. --accuracy: the adapters are those of
bench_llm.py in its work directory (in folders that end with the tasks' names), and each task's accuracy is measured
with what comes back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import planted
import torch
from library_table import results, show
from rivals import most_memory

from tvbases_hf.basis import LoraBasis, libraries
from tvbases_hf.basis.compress import compress

Row = dict[str, Any]
RIVALS = ("vlora-dev=1", "vlora-dev=4", "vlora-dev nf4=6", "lorashare=16", "lorashare=64")
# Of the bytes that a rival takes; what is chosen seldom comes closer.
LESS = 0.998
FOUR_BITS = {"budget": 0.15, "bits": "4"}


def ours(request: Mapping[str, Any]) -> Row:
    """Compress, restore one and add one, in this process: what came out, and what it took."""
    base, tasks, out = Path(request["base"]), request["adapters"], Path(request["out"])
    start, cpu = time.perf_counter(), time.process_time()
    found = compress(base, tasks, out, method="library", **request["options"])
    row = {
        "error": found["mean_square_error"],
        "largest_error": max(found["task_error"]) ** 2,
        "clusters": found["clusters"],
        "bytes": found["directory_bytes"],
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "memory": most_memory(),
    }
    start = time.perf_counter()
    library = LoraBasis.from_pretrained(out)
    library.adapter(next(iter(tasks)))
    row["restore_seconds"] = time.perf_counter() - start
    for task in tasks if request["restored"] else ():
        library.adapter(task).save_pretrained(Path(request["restored"]) / task)
    before, start = _digests(out), time.perf_counter()
    found = libraries.add(out, base, request["more"])
    row |= {"add_seconds": time.perf_counter() - start, "added_error": found["task_error"][-1] ** 2}
    after = _digests(out)
    return row | {"others_unchanged": all(after.get(file) == digest for file, digest in before.items())}


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(directory.glob("basis-*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def alone(command: Sequence[str], request: Mapping[str, Any]) -> Row:
    """A line of JSON from a process of its own, so that the memory is its."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": done.stderr.strip()[-200:] or f"ended with {done.returncode}"}


class Comparison:
    """The same adapters through every program."""

    def __init__(self, base: Path, adapters: dict[str, str], work: Path, accuracy: Path | None = None) -> None:
        self.base, self.work, self.accuracy = base, work, accuracy
        *many, last = adapters.items()
        self.request = {"base": str(base), "adapters": dict(many), "more": dict([last])}
        self.whole = sum((Path(path) / "adapter_model.safetensors").stat().st_size for _, path in many)

    def ours(self, **options: Any) -> Row:
        command = [sys.executable, __file__, "--request"]
        return self._row("tvbases-hf", command, {"options": options}, bits=options.get("bits"))

    def rival(self, python: str, package: str, components: int) -> Row:
        command = [python, str(Path(__file__).with_name("rivals.py"))]
        asked = {"package": package, "components": components}
        return self._row(package, command, asked, components=components)

    def _row(self, package: str, command: Sequence[str], asked: Mapping[str, Any], **told: Any) -> Row:
        out, restored = self.work / "made", self.work / "restored"
        for folder in (out, restored):
            shutil.rmtree(folder, ignore_errors=True)
        places = {"out": str(out), "restored": str(restored) if self.accuracy else None}
        row = {"package": package, **told, **alone(command, {**self.request, **asked, **places})}
        if "failed" not in row:
            row["share"] = row["bytes"] / self.whole
            if self.accuracy:
                row["accuracy"] = accuracy(self.accuracy, {task: restored / task for task in self.request["adapters"]})
        show(row)
        return row

    def all(self, budgets: Sequence[float], python: str | None, rivals: Sequence[str]) -> list[Row]:
        """Ours at every budget; then every rival, each followed by ours at the same share of the bytes."""
        rows = [self.ours(budget=budget) for budget in budgets]
        for asked in rivals if python else ():
            package, _, count = asked.partition("=")
            rows.append(self.rival(python or "", package, int(count)))
            if rows[-1].get("share", 1.0) < 1:
                rows.append(self.ours(budget=LESS * rows[-1]["share"]) | {"beside": len(rows) - 1})
        return rows


def accuracy(workdir: Path, adapters: Mapping[str, Path]) -> float:
    """Mean per cent right of bench_llm's tasks, each with its own adapters: those whose names end with the task's."""
    from llm.settings import FULL
    from llm.workshop import Workshop, mean

    from tvbases_hf import Vectors
    from tvbases_hf.learning.inplace import InPlace

    shop = _workshops.setdefault(workdir, Workshop(workdir, FULL, "auto|auto"))
    tasks = {name: task for name in adapters if (task := name.rpartition("-")[2]) in FULL.tasks}
    vectors = Vectors.open(shop.base, {name: str(adapters[name]) for name in tasks})
    place, right = InPlace(shop.model, vectors.names), {}
    for index, (name, task) in enumerate(tasks.items()):
        with place.changed(lambda weight, k=index: vectors.deltas(weight)[k]) as model:
            right[name] = shop.accuracies(model, "test", [task])[0][task]
    return mean(right)


_workshops: dict[Path, Any] = {}


def of_planted(options: argparse.Namespace, work: Path) -> Row:
    how = {"layers": options.layers, "families": options.families, "dtype": getattr(torch, options.dtype)}
    base = planted.write_base(work / "base", options.layers)
    folders = [work / f"t{index:04d}" for index in range(options.count + 1)]
    for index, folder in enumerate(folders):
        if not (folder / "adapter_config.json").exists():
            planted.write_adapter(folder, index, **how)
    tried = Comparison(base, {folder.name: str(folder) for folder in folders}, work)
    layers = f"{options.layers} layer{'s' if options.layers > 1 else ''}"
    size = f"{options.families} families, {layers}, {options.dtype}"
    what = f"{options.count} planted adapters of rank 16 in {size}"
    return {"what": what, "whole": tried.whole, "rows": tried.all([options.budget], options.rivals, options.components)}


def of_directory(options: argparse.Namespace, work: Path) -> Row:
    """The last adapter of all, by name, is the one that is added."""
    folders = sorted(file.parent for file in options.adapters.rglob("adapter_config.json"))
    adapters = {folder.relative_to(options.adapters).as_posix().replace("/", "-"): str(folder) for folder in folders}
    tried = Comparison(options.base, adapters, work, options.accuracy)
    what = f"{len(folders) - 1} trained adapters of {options.label or options.base.name}"
    report: Row = {"what": what, "whole": tried.whole, "rows": []}
    if options.accuracy:
        own = {task: Path(path) for task, path in tried.request["adapters"].items()}
        report["accuracy"] = accuracy(options.accuracy, own)
    report["rows"] = [*tried.all(options.budgets, options.rivals, options.components), tried.ours(**FOUR_BITS)]
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="planted adapters")
    parser.add_argument("--layers", type=int, default=30, help="of the planted model")
    parser.add_argument("--families", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.08, help="of planted adapters")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.5, 0.25, 0.15], help="of trained ones")
    parser.add_argument("--adapters", type=Path, help="a folder of adapters, instead of planted ones")
    parser.add_argument("--base", type=Path, help="their base")
    parser.add_argument("--label", help="what the table calls the base; default: its directory")
    parser.add_argument("--accuracy", type=Path, help="the work directory of bench_llm.py (with its full tasks)")
    parser.add_argument("--rivals", help="a Python that has vlora-dev and lorashare")
    parser.add_argument("--components", nargs="+", default=RIVALS, help="PACKAGE=COMPONENTS of rivals")
    parser.add_argument("--dtype", default="bfloat16", help="of planted adapters; vlora-dev reads float32 alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="keep adapters here for the next run")
    parser.add_argument("--write", type=Path, nargs="+", help="a table, and the files of figures that it is of")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.request:
        print(json.dumps(ours(json.loads(options.request.read_text()))))
    elif options.write:
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in options.write[1:]]
        options.write[0].write_text(results(reports), encoding="utf-8")
    else:
        with tempfile.TemporaryDirectory() as scratch:
            work = options.workdir or Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            report = of_directory(options, work) if options.adapters else of_planted(options, work)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
