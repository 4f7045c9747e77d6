"""The demo: fine-tune one base on eight tasks, compress the eight, merge with mergekit, compare."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from tvbases_hf.basis import Basis
from tvbases_hf.errors import MissingExtraError, TvbasesError
from tvbases_hf.models.gram import Gram
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.files import home_path
from tvbases_hf.storage.output import writing
from tvbases_hf.storage.reports import is_report, write_picture, write_report
from tvbases_hf.text import Terminal

from . import encoder, store
from .compare import Merger, Result, compare, evaluate, methods
from .encoder import Problem, Recipe
from .plot import draw
from .table import print_results
from .tasks import TASKS, make_task

DEFAULT_WORKDIR = Path("~/.cache/tvbases-hf/demo")
# The model that mergekit writes and the sum in memory differ by the rounding of a few float32 operations on weights
# that are mostly below 1; the fine-tunes differ from the base by about 1e-4 per weight.
SAME_WEIGHTS = 2e-6


@dataclass(frozen=True)
class Settings:
    """What the demo computes. `sizes` are the numbers of training, validation and test sentences per task."""

    tasks: tuple[str, ...] = TASKS
    sizes: tuple[int, int, int] = (600, 100, 200)
    num_bases: int = 4
    recipe: Recipe = field(default_factory=Recipe)
    validation: int = 40  # sentences per task that choose alpha
    paper_seeds: int = 2
    subsets: int = 6
    seed: int = 0


def run_demo(
    workdir: str | Path | None = None,
    json_file: str | Path | None = None,
    plot: str | Path | None = None,
    quiet: bool = False,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Run the demo in `workdir`, and return what goes into `json_file`. A second run uses what the first has trained.

    The first run takes a few minutes on two cores, 1.3 GB of disk and 2.5 GB of memory.

    Raises:
        TvbasesError: a missing extra, no weights, a full disk, and whatever the commands that it runs refuse.
    """
    started = time.monotonic()
    settings = settings or Settings()
    require_mergekit()
    workdir = home_path(workdir or DEFAULT_WORKDIR).absolute()
    picture = home_path(plot).absolute() if plot else workdir / "demo.png"
    for directory in (workdir, picture.parent, *([Path(json_file).parent] if json_file else [])):
        with writing(directory):  # now, not after the work
            directory.mkdir(parents=True, exist_ok=True)
    say = Terminal(quiet=quiet, highlight=False, soft_wrap=True)

    problems, models, trained = fine_tunes(workdir, settings, say)
    basis = compress(workdir, models, settings, say)
    gram = Gram(basis.tasks, torch.tensor(basis.info.gram, dtype=torch.float64), basis.info.base_norm)
    vectors = Vectors.open(workdir / "base", models)
    merger = Merger(encoder.load(workdir / "base")[0], vectors, problems)
    results = measure(merger, models, gram, basis, settings, say)
    merged, check = merge(workdir, models, results["ae_bases"], basis, merger, say)
    results["ae_bases"] = merged

    report = {**summary(results, basis, gram), **check, "trained": trained, "settings": asdict(settings)}
    print_results(results, list(models), say)
    # In the work directory, which is the demo's own, an older picture may have no mark yet.
    write_picture(picture, draw(report), is_report if plot else lambda _: True)
    report |= {"plot": str(picture), "seconds": round(time.monotonic() - started, 1)}
    say.print(f"Picture {picture}\nModels  {workdir}\n{report['seconds']:.0f} s")
    if json_file is not None:
        write_report(json_file, report)
    return report


def require_mergekit() -> None:
    """Fail before the work, not after it."""
    if find_spec("mergekit") is None:
        raise MissingExtraError('mergekit is missing; pip install "tvbases-hf[demo]"')


def fine_tunes(
    workdir: Path, settings: Settings, say: Console
) -> tuple[dict[str, Problem], dict[str, Path], list[str]]:
    """(tasks ready for the encoder, {task: fine-tuned checkpoint}, tasks that were trained just now)."""
    base = store.base_model(workdir / "base", say.quiet)
    model, tokenizer = encoder.load(base)
    tasks = {name: make_task(name, settings.seed, settings.sizes) for name in settings.tasks}
    recipe = settings.recipe
    problems = {name: encoder.prepare(model, tokenizer, task, recipe.max_tokens) for name, task in tasks.items()}
    both = {name: (task, problems[name]) for name, task in tasks.items()}
    began = time.monotonic()
    models, trained = store.fine_tuned_models(workdir / "models", base, model, tokenizer, both, recipe, say.quiet)
    say.print(
        f"{len(tasks)} fine-tunes of {store.HUB_ID}: {len(trained)} trained in {time.monotonic() - began:.0f} s, "
        f"{len(tasks) - len(trained)} from {workdir / 'models'}"
    )
    return problems, models, trained


def command(arguments: list[str], workdir: Path, say: Console) -> None:
    """Run a `tvbases` command, and show it with paths relative to the work directory."""
    say.print("\n$ tvbases " + " ".join(arguments).replace(f"{workdir}/", ""), style="bold")
    done = subprocess.run([sys.executable, "-m", "tvbases_hf", *arguments, *["--quiet"] * say.quiet])
    if done.returncode:
        raise TvbasesError(f"tvbases {arguments[0]} stopped with exit code {done.returncode}; see above")


def compress(workdir: Path, models: Mapping[str, Path], settings: Settings, say: Console) -> Basis:
    """`tvbases compress`: the basis directory that stands for all fine-tunes."""
    out = workdir / "basis"
    arguments = ["compress", "--base", str(workdir / "base")]
    for name, path in models.items():
        arguments += ["--task", f"{name}={path}"]
    command([*arguments, "--num-bases", str(settings.num_bases), "--out", str(out)], workdir, say)
    return Basis.from_pretrained(out)


def measure(
    merger: Merger, models: Mapping[str, Path], gram: Gram, basis: Basis, settings: Settings, say: Console
) -> dict[str, Result]:
    """Every row of the table, evaluated in memory."""
    untouched = merger.accuracy(torch.zeros(len(models), dtype=torch.float64), "test")
    identity = torch.eye(len(models), dtype=torch.float64)
    own = [merger.accuracy(identity[i], "test", only=name)[0] for i, name in enumerate(models)]
    chosen = methods(gram.matrix, basis.encoder, settings.paper_seeds, settings.subsets)
    results = [
        Result("base", "base, zero-shot", 0, [untouched]),
        Result("finetuned", "fine-tuned, one model per task", len(models), [own]),
        *compare(merger, chosen, settings.validation, say.quiet),
    ]
    return {result.key: result for result in results}


def merge(
    workdir: Path, models: Mapping[str, Path], found: Result, basis: Basis, merger: Merger, say: Console
) -> tuple[Result, dict[str, Any]]:
    """`tvbases mergekit-yaml`: the merged model on disk, its accuracy, and how far it is from the sum in memory.

    Raises RuntimeError if they are not the same model: then the demo has found a defect.
    """
    config = {
        "merge_method": "ae_bases",
        "base_model": str(workdir / "base"),
        "models": [{"model": str(path)} for path in models.values()],
        "parameters": {"num_bases": basis.info.num_bases, "merge": "task_arithmetic", "lambda": found.alpha[0]},
        "dtype": "float32",
    }
    file, out = workdir / "merge.yml", workdir / "merged"
    with writing(file):
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command(["mergekit-yaml", str(file), str(out)], workdir, say)
    written = Checkpoint.open(out)
    weights = found.alpha[0] * basis.encoder.sum(1)
    apart = max(float((written.read(name) - tensor).abs().max()) for name, tensor in merger.merged(weights))
    accuracy = evaluate(encoder.load(out)[0], merger.problems, "test")
    result = replace(found, accuracy=[accuracy])
    if apart > SAME_WEIGHTS:
        raise RuntimeError(f"the merged model in {out} differs from the sum in memory by {apart:.1e}; this is a defect")
    return result, {"mergekit": {"in_memory": found.mean, "merged": result.mean, "largest_difference": apart}}


def summary(results: Mapping[str, Result], basis: Basis, gram: Gram) -> dict[str, Any]:
    """Plain numbers, in per cent where they are accuracies."""
    return {
        "accuracy": {key: round(result.mean, 2) for key, result in results.items()},
        "spread": {key: round(result.spread, 2) for key, result in results.items()},
        "tasks": list(gram.tasks),
        "per_task": {key: dict(zip(gram.tasks, result.tasks, strict=True)) for key, result in results.items()},
        "title": {key: result.title for key, result in results.items()},
        "vectors": {key: result.vectors for key, result in results.items()},
        "alpha": {key: result.alpha for key, result in results.items()},
        "encoder": basis.encoder.tolist(),
        "cosine": gram.cosine.tolist(),
    }
