"""A library of many adapters: error, bytes, time and memory, beside vlora-dev and lorashare.

    python examples/benchmarks/bench_library.py [--count 1000] [--budget 0.08] [--layers 30] [--workdir DIR]
    python examples/benchmarks/bench_library.py --adapters DIR --base BASE [--budgets 0.5 0.25 0.15]
    ... --rivals PYTHON    # of an environment with vlora-dev and lorashare: the same adapters through them

Without --adapters, adapters with planted common subspaces in the shapes of SmolLM2-135M (planted.py) are written to the
work directory and compressed in a process of its own, whose memory is measured. Then one more adapter is added, which
must leave the others' files alone, and one is restored. With --adapters, those in the directory's folders are
compressed at every budget. Errors are means over the adapters of the squared relative error of what comes back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import planted

from tvbases_hf.basis import LoraBasis, libraries
from tvbases_hf.basis.compress import compress


def run(base: Path, tasks: dict[str, str], out: Path, budget: float) -> dict[str, Any]:
    """Compress, in this process: what came out, and what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    found = compress(base, tasks, out, method="library", budget=budget)
    return {
        "tasks": len(tasks),
        "clusters": found["clusters"],
        "error": found["mean_square_error"],
        "largest_error": max(found["task_error"]) ** 2,
        "share": found["share"],
        "bytes": found["bytes"],
        "directory_bytes": found["directory_bytes"],
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def alone(base: Path, tasks: dict[str, str], out: Path, budget: float) -> dict[str, Any]:
    """The same in a process of its own, so that the memory is its."""
    request = out.with_suffix(".json")
    request.write_text(json.dumps({"base": str(base), "tasks": tasks, "out": str(out), "budget": budget}))
    done = subprocess.run([sys.executable, __file__, "--request", str(request)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def one_more(base: Path, out: Path, name: str, adapter: Path) -> dict[str, Any]:
    """Add an adapter to a library, and restore one: seconds, and whether the others' files are the same."""
    before = _digests(out)
    start = time.perf_counter()
    found = libraries.add(out, base, {name: adapter})
    added = time.perf_counter() - start
    after = _digests(out)
    start = time.perf_counter()
    LoraBasis.from_pretrained(out).adapter(name)
    return {
        "add_seconds": added,
        "others_unchanged": all(after.get(file) == digest for file, digest in before.items()),
        "added_error": found["task_error"][-1] ** 2,
        "added_bytes": found["task_bytes"][-1],
        "restore_seconds": time.perf_counter() - start,
    }


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(directory.glob("basis-*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rivals(python: str, tasks: dict[str, str], components: Sequence[int], work: Path) -> list[dict[str, Any]]:
    request = work / "rivals.json"
    request.write_text(json.dumps({"adapters": tasks, "components": list(components), "work": str(work)}))
    script = Path(__file__).with_name("rivals.py")
    done = subprocess.run([python, str(script), str(request)], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines] or [{"failed": done.stderr[-300:]}]


def show(rows: list[dict[str, Any]], whole: int) -> None:
    print(f"{'':24} {'bytes':>7} {'error':>10} {'seconds':>8}")
    for row in rows:
        name = f"{row.get('package', 'tvbases-hf')} {row.get('components', '')}"
        if "failed" in row:
            print(f"{name:24} {row['failed']}")
        else:
            print(f"{name:24} {row['bytes'] / whole:7.1%} {row['error']:10.2g} {row['seconds']:8.1f}")


def size_of(tasks: dict[str, str]) -> int:
    return sum((Path(path) / "adapter_model.safetensors").stat().st_size for path in tasks.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="planted adapters")
    parser.add_argument("--layers", type=int, default=30, help="of the planted model")
    parser.add_argument("--families", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.08)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.15])
    parser.add_argument("--adapters", type=Path, help="a folder of adapters, instead of planted ones")
    parser.add_argument("--base", type=Path, help="their base")
    parser.add_argument("--rivals", help="a Python that has vlora-dev and lorashare")
    parser.add_argument("--components", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="keep adapters here for the next run")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.request:
        asked = json.loads(options.request.read_text())
        print(json.dumps(run(Path(asked["base"]), asked["tasks"], Path(asked["out"]), asked["budget"])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = options.workdir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        report = of_directory(options, work) if options.adapters else of_planted(options, work)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def of_planted(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    how = {"layers": options.layers, "families": options.families}
    base = planted.write_base(work / "base", options.layers)
    folders = [work / f"t{index:04d}" for index in range(options.count + 1)]
    for index, folder in enumerate(folders):
        if not (folder / "adapter_config.json").exists():
            planted.write_adapter(folder, index, **how)
    *many, last = folders
    tasks = {folder.name: str(folder) for folder in many}
    report: dict[str, Any] = {"ours": [alone(base, tasks, work / "library", options.budget)]}
    report["one more"] = one_more(base, work / "library", last.name, last)
    report["rivals"] = rivals(options.rivals, tasks, options.components, work) if options.rivals else []
    show([*report["ours"], *report["rivals"]], size_of(tasks))
    own, more = report["ours"][0], report["one more"]
    whole = own["directory_bytes"] / size_of(tasks)
    print(
        f"{own['tasks']} adapters in {own['clusters']} clusters, {whole:.2%} of their bytes with lists and card: "
        f"{own['seconds']:.0f} s ({own['cpu_seconds']:.0f} s of processors), {own['memory'] / 1e9:.2f} GB; one more "
        f"{more['add_seconds']:.1f} s, the others unchanged: {more['others_unchanged']}; one back "
        f"{more['restore_seconds']:.2f} s"
    )
    return report


def of_directory(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    folders = sorted(file.parent for file in options.adapters.rglob("adapter_config.json"))
    tasks = {folder.relative_to(options.adapters).as_posix().replace("/", "-"): str(folder) for folder in folders}
    report: dict[str, Any] = {"ours": []}
    for budget in options.budgets:
        report["ours"].append(run(options.base, tasks, work / f"library-{budget:g}", budget))
    report["rivals"] = rivals(options.rivals, tasks, options.components, work) if options.rivals else []
    show([*report["ours"], *report["rivals"]], size_of(tasks))
    return report


if __name__ == "__main__":
    main()
