"""Merging at scale: base and four fine-tunes in the shapes of Llama-3.2-1B, natively and through mergekit, in turns.

    python examples/benchmarks/bench_llama.py [--quick] [--cold] [--json FILE] [--workdir DIR] [--only JOB]
    python examples/benchmarks/bench_llama.py --job tsv [--job iso_c ...] [--layers N] [--before CHECKOUT]

Five checkpoints of 2.5 GB (bfloat16, three shards each) are written to a temporary directory and removed at the end.
Every job is a process of its own; the median of --rounds is shown, and the ratio to mergekit's own method:

* task_arithmetic and ties by mergekit, and by `tvbases merge` from the same YAML (float32 work, bfloat16 out);
* ae_bases by `tvbases merge`, and inside mergekit;
* the Gram matrix (`tvbases inspect`) and `tvbases compress`, beside plain reading of all bytes;
* the native merge on one thread, and as two processes of one thread under accelerate, with the same bytes;
* with --job instead of all these: native merges by tsv, tsv_compress, devec_unique, iso_c or ae_bases; with --before
  beside those of another checkout of this project (`git worktree add`), and with --layers of so many of the layers and
  a sixteenth of the vocabulary: the whole model takes a quarter of an hour of a processor.

Memory is what the operating system says: the peak of anonymous memory (allocated) and of resident memory, which counts
pages of mapped files too. --cold drops the page cache before every job (root only). The outputs of native and
mergekit's merges are compared: largest difference in units in the last place, and the share of numbers that differ.
Differences of 16-bit numbers have few values, and of entries equal in magnitude at its cut mergekit's ties keeps some
by a sort that is not stable: which ones depends on the machine. --stable (on with --quick) runs it once more with a
stable sort, which keeps those that come first, as the native merge does.

The second table holds what `tvbases plan` predicts for every native job beside what was found: bytes of weights read
(one more run of each job on one thread, see count_reads.py; --no-count leaves it out), bytes of the safetensors files
written, and the peak of anonymous memory of the largest process. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama import LLAMA_1B, Shape, difference, write_model
from processes import measure
from rich.console import Console
from rich.table import Table

TASKS = ("math", "code", "law", "chat")
TVBASES = [sys.executable, "-m", "tvbases_hf"]
COUNT = [sys.executable, str(Path(__file__).with_name("count_reads.py"))]
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
BEFORE = {f"{method}, native": f"{method}, before" for method in ("tsv", "tsv_compress", "devec_unique", "iso_c")}
EQUAL = (
    *BEFORE.items(),
    ("task_arithmetic, native", "task_arithmetic, mergekit"),
    ("ae_bases, native", "ae_bases in mergekit"),
    ("ties, native", "ties, mergekit"),
    ("ties, native", "ties, mergekit with a stable sort"),
    ("task_arithmetic, two processes", "task_arithmetic, one thread"),
    ("task_arithmetic, one thread", "task_arithmetic, native"),
)
# What `tvbases plan` is asked about a job, beside the models.
PLANS: dict[str, list[str]] = {
    "gram": ["gram"],
    "compress": ["compress"],
    "task_arithmetic, native": ["task_arithmetic"],
    "ae_bases, native": ["ae_bases"],
    "ties, native": ["ties"],
    "task_arithmetic, one thread": ["task_arithmetic", "--threads", "1"],
    "task_arithmetic, two processes": ["task_arithmetic", "--threads", "1", "--processes", "2"],
    **{f"{method}, native": [method] for method in ("tsv", "tsv_compress", "devec_unique", "iso_c")},
}
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": 0.2},
    "ae_bases": {"num_bases": 2, "lambda": 0.4},
    "tsv": {"lambda": 1.0},
    "tsv_compress": {"lambda": 1.0},
    "devec_unique": {"rank": 0.25},
    "iso_c": {"lambda": 1.0},
}
CHOSEN = tuple(method for method in METHODS if method not in ("task_arithmetic", "ties"))

QUICK = Shape(hidden=512, intermediate=2048, layers=8, key_value=128, vocabulary=32_064)


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
    base, tasks = str(root / "base"), [part for task in TASKS for part in ("--task", f"{task}={root / task}")]
    files = sorted(str(file) for name in ("base", *TASKS) for file in (root / name).glob("*.safetensors"))
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    native = lambda method: [*TVBASES, "merge", str(root / f"{method}.yml"), str(out), "--quiet"]  # noqa: E731
    inside = lambda method: [  # noqa: E731
        *TVBASES, "mergekit-yaml", str(root / f"{method}.yml"), str(out), "--quiet", "--no-copy-tokenizer"
    ]  # fmt: skip
    alone = [*native("task_arithmetic"), "--threads", "1"]
    return {
        "reading": [sys.executable, "-c", READ, *files],
        "gram": [*TVBASES, "inspect", "--base", base, *tasks, "--quiet"],
        "compress": [*TVBASES, "compress", "--base", base, *tasks, "-m", "2", "--out", str(out), "--quiet"],
        "task_arithmetic, mergekit": inside("task_arithmetic"),
        "task_arithmetic, native": native("task_arithmetic"),
        "ae_bases, native": native("ae_bases"),
        "ae_bases in mergekit": inside("ae_bases"),
        "ties, native": native("ties"),
        "task_arithmetic, one thread": alone,
        "task_arithmetic, two processes": [*launch, *alone[1:]],
        # Last, because it fills the memory: what came after would find nothing left in the page cache.
        "ties, mergekit": inside("ties"),
        "ties, mergekit with a stable sort": [sys.executable, "-c", STABLE, *inside("ties")[3:]],
    }


def chosen_jobs(root: Path, out: Path, methods: list[str], before: Path | None) -> dict[str, list[str]]:
    """Native merges, each beside that of another checkout."""
    found: dict[str, list[str]] = {}
    for method in methods:
        merge = ["merge", str(root / f"{method}.yml"), str(out), "--quiet"]
        if before is not None:
            places = f"PYTHONPATH={before}:{before / 'integrations'}"
            found[f"{method}, before"] = ["env", places, *TVBASES, *merge]
        found[f"{method}, native"] = [*TVBASES, *merge]
    return found


def predicted(root: Path, job: str) -> dict[str, Any]:
    """What `tvbases plan` says of a job, see tvbases_hf.cli.planning.Plan; the bandwidth is of no use here."""
    file = root / "plan.json"
    models = ["--base", str(root / "base"), "--models", str(len(TASKS)), "-m", "2"]
    options = ["--bandwidth", "1GB", "--json", str(file), "--quiet"]
    measure([*TVBASES, "plan", *models, "--job", *PLANS[job], *options])
    return json.loads(file.read_text(encoding="utf-8"))


def read_by(root: Path, command: list[str]) -> int:
    """Bytes of weights that a native command reads."""
    file = root / "reads.json"
    measure([*COUNT, str(file), *command[len(TVBASES) :]])
    shutil.rmtree(root / "out", ignore_errors=True)
    return json.loads(file.read_text(encoding="utf-8"))["bytes"]


def run(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every job, its plan, and the comparisons."""
    out = root / "out"
    every = chosen_jobs(root, out, options.job, options.before) if options.job else jobs(root, out)
    wanted = {
        job: command
        for job, command in every.items()
        if (job in options.only if options.only else options.stable or "stable" not in job)
    }
    found: dict[str, list[dict[str, float]]] = {}
    kept: dict[str, Path] = {}
    for _ in range(options.rounds):
        for index, (job, command) in enumerate(wanted.items()):
            found.setdefault(job, []).append(measure(command, options.cold))
            if out.is_dir():
                kept[job] = root / f"out{index}"
                shutil.rmtree(kept[job], ignore_errors=True)
                out.rename(kept[job])
    report: dict[str, Any] = {"jobs": summary(found), "plans": {}, "equal": {}}
    for job in wanted.keys() & PLANS.keys():
        report["plans"][job] = comparison(
            predicted(root, job),
            read=read_by(root, wanted[job]) if options.count and PLANS[job][1:] == [] else None,
            written=sum(file.stat().st_size for file in kept[job].glob("*.safetensors")) if job in kept else 0,
            memory=report["jobs"][job]["process"],
        )
    report["plans"] = {job: report["plans"][job] for job in PLANS if job in report["plans"]}
    for one, other in EQUAL:
        if one in kept and other in kept:
            report["equal"][f"{one} / {other}"] = difference(kept[one], kept[other])
    return report


def comparison(plan: dict[str, Any], **measured: float | None) -> dict[str, dict[str, float | None]]:
    """By figure: planned, measured, and their ratio; None for what was not measured, and for nothing of nothing."""
    return {
        key: {"plan": plan[key], "measured": value, "ratio": value / plan[key] if value and plan[key] else None}
        for key, value in measured.items()
    }


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and the ratio of seconds to the job that each is compared with."""
    rows = {job: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for job, runs in found.items()}
    for job, other in RATIOS.items() | BEFORE.items():
        if job in rows and other in rows:
            rows[job]["ratio"] = rows[job]["seconds"] / rows[other]["seconds"]
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of 90 MB instead of 2.5 GB; three minutes")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every job (root only)")
    parser.add_argument(
        "--stable", action=argparse.BooleanOptionalAction, help="compare ties with mergekit's under a stable sort too"
    )
    parser.add_argument(
        "--count", action=argparse.BooleanOptionalAction, default=True, help="run once more to count the bytes read"
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often every job is run, in turns")
    parser.add_argument("--only", action="append", default=[], help="a job to run; repeat")
    parser.add_argument("--job", action="append", default=[], choices=CHOSEN, help="only a merge by this; repeat")
    parser.add_argument("--before", type=Path, help="--job: a checkout of another version, which does the same")
    parser.add_argument("--layers", type=int, help="--job: of so many layers, and a sixteenth of the vocabulary")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--workdir", type=Path, help="where the models are put; by default the system's temporary one")
    options = parser.parse_args(arguments)
    options.stable = options.quick if options.stable is None else options.stable
    shape = QUICK if options.quick else LLAMA_1B
    if options.layers:
        shape = replace(shape, layers=options.layers, vocabulary=shape.vocabulary // 16)
    with models(shape, options.workdir) as (root, total):
        report = {"bytes": total, "cold": options.cold, **run(root, options)}
    show(report, Console(width=120))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def show(report: dict[str, Any], console: Console) -> None:
    state = "cold" if report["cold"] else "warm"
    title = f"base and {len(TASKS)} fine-tunes, {report['bytes'] / 1e9:.1f} GB in all, {state}"
    table = Table("job", "seconds", "ratio", "anonymous MB", "resident MB", title=title, title_justify="left")
    for job, row in report["jobs"].items():
        ratio = f"{row['ratio']:.2f} x {(RATIOS | BEFORE)[job]}" if "ratio" in row else ""
        table.add_row(
            job, f"{row['seconds']:.1f}", ratio, f"{row['anonymous'] / 1e6:.0f}", f"{row['resident'] / 1e6:.0f}"
        )
    console.print(table)
    for pair, apart in report["equal"].items():
        console.print(
            f"{pair}: {apart['ulps']} units in the last place at most, {apart['share']:.2%} of the numbers differ"
        )
    title = "tvbases plan: planned / measured MB, and measured : planned"
    table = Table("job", "read", "", "written", "", "memory of a process", "", title=title, title_justify="left")
    for job, figures in report["plans"].items():
        cells = [job]
        for figure in figures.values():
            measured = "-" if figure["measured"] is None else f"{figure['measured'] / 1e6:,.1f}"
            ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.3f}"
            cells += [f"{figure['plan'] / 1e6:,.1f} / {measured}", ratio]
        table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()
