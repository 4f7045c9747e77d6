"""The sections on addition: the main table, the other kinds, methods with data, and the bases' own choices."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping

from evidence.markdown import megabytes, span, spread, standard_error, table
from evidence.runner import Answers

from .. import addition, with_data
from ..kinds import ALL, KINDS, SIDES, TITLES
from ..settings import Settings
from . import paper
from .claims import average, merged_tasks

Found = Mapping[str, Answers]
MAIN = ("balanced", "ae_adam", "rand_select", "pca")


def fine_tunes(found: Found, settings: Settings) -> str:
    tuned = found["finetune"]
    names = {"full": "fine-tuned", "lora": f"LoRA, r = {settings.recipe.rank}", "dora": "DoRA"}
    kinds = {kind: name for kind, name in names.items() if tuned.of(kind=kind)}
    rows = []
    for task in dict.fromkeys(q["task"] for q, _ in tuned):
        own = [spread([a["own"] for a in tuned.of(task=task, kind=kind)]) for kind in kinds]
        rows.append([task, f"{tuned.of(task=task)[0]['zero_shot']:.1f}", *own])
    merged = {kind: merged_tasks(tuned, settings, kind) for kind in kinds}
    means = [statistics.mean(a["zero_shot"] for a in merged["full"])]
    means += [statistics.mean(a["own"] for a in answers) for answers in merged.values()]
    rows.append(["**mean of those merged**", *(f"**{mean:.1f}**" for mean in means)])
    return table(["task", "zero-shot", *kinds.values()], rows)


def main_table(found: Found, settings: Settings) -> str:
    """Mean ± standard deviation over fine-tuning seeds, and draws where chance decides, with the alphas."""
    answers, methods = found["addition"], addition.METHODS
    accuracies, costs = [], []
    for kind, m in rows_of(settings):
        cells = [answers.of(method=method, kind=kind, num_bases=m, over="bases") for method in methods]
        published = [paper.ADDITION[method].get(kind, "") if m != settings.num_bases[1] else "" for method in methods]
        name = f"**{TITLES[kind]}**" if kind in (ALL, "balanced") else TITLES[kind]
        texts = [f"{spread([a['accuracy'] for a in cell])} (α {span(a['alpha'] for a in cell)})" for cell in cells]
        accuracies.append([name, m, *texts, *published])
        seconds = [f"{statistics.mean(a['processor_seconds'] for a in cell):.0f}" for cell in cells]
        costs.append([TITLES[kind], m, megabytes(cells[0][0]["bytes"]), len(cells[0]), *seconds])
    titles = list(methods.values())
    short = ["paper: TA", "TIES", "TSV-M"]
    tuned = merged_tasks(found["finetune"], settings)
    own, zero = (statistics.mean(a[key] for a in tuned) for key in ("own", "zero_shot"))
    error = standard_error(own, settings.test * len(settings.tasks))
    return "\n\n".join([
        f"Zero-shot {zero:.1f}, fine-tuned on the task {own:.1f} (paper: {paper.ZERO_SHOT} and {paper.FINE_TUNED}).",
        table(["vectors", "M", *titles, *short], accuracies),
        f"That the test sentences are a sample gives an accuracy a standard error of about {error:.1f} points; methods "
        "are compared on the same sentences, so differences are known better. What it costs, in seconds of one core "
        "with the search for alpha:",
        table(["vectors", "M", "MB kept", "runs", *titles], costs),
    ])  # fmt: skip


def rows_of(settings: Settings) -> list[tuple[str, int]]:
    """(kind, M) of the main table."""
    return [(ALL, len(settings.tasks)), *((kind, m) for m in settings.num_bases for kind in MAIN)]


def product(found: Found, settings: Settings) -> str:
    """All methods x kinds of vectors, over the bases and over the reconstructions, with the first fine-tuning seed."""
    titles = addition.METHODS | with_data.TITLES
    rows = []
    for over, num_bases, kind in places(settings):
        cells = [_cell(found, method, kind, num_bases, over, settings.seeds[0]) for method in titles]
        rows.append([TITLES[kind], "" if kind == ALL else over, num_bases, *cells])
    return table(["vectors", "merged", "M", *titles.values()], rows)


def places(settings: Settings) -> list[tuple[str, int, str]]:
    """(merged, M, kind) of all rows that there can be."""
    mixed = itertools.product(SIDES, settings.num_bases, KINDS)
    return [("bases", len(settings.tasks), ALL), *mixed]


def _cell(found: Found, method: str, kind: str, num_bases: int, over: str, seed: int) -> str:
    if addition.known_exactly(method, kind, over):
        return "as all vectors, exactly"
    asked = {"method": method, "kind": kind, "num_bases": num_bases, "over": over}
    if method in with_data.TITLES:
        cell = found["with_data"].of(**asked)
    else:
        cell = found["addition"].of(**asked, seed=seed)[:1]  # the first draw
    scaled = method in addition.METHODS or method in with_data.SCALED
    return f"{cell[0]['accuracy']:.1f}" + (f" (α {cell[0]['alpha']:g})" if scaled else "") if cell else ""


def costs(found: Found, settings: Settings) -> str:
    """Of the methods that need data: bytes kept, seconds of one core, and what the paper reports."""
    answers = found["with_data"]
    shown = [(ALL, len(settings.tasks)), ("balanced", settings.half), ("rand_select", settings.half)]
    rows = []
    for method, title in with_data.TITLES.items():
        cells = [answers.one(method=method, kind=kind, num_bases=m, over="bases") for kind, m in shown]
        published = paper.LOCALIZE if method == "localize" else {}
        rows.append([
            title,
            " / ".join(megabytes(c["bytes"]) for c in cells),
            " / ".join(f"{c['processor_seconds']:.0f}" for c in cells),
            " / ".join(f"{published[kind]}" for kind, _ in shown if kind in published),
        ])  # fmt: skip
    names = f"all / balanced AE, M = {settings.half} / RandSelect"
    return table(["method", f"MB kept ({names})", "seconds", "paper's accuracy"], rows)


def sizes(found: Found, settings: Settings) -> str:
    by_size = accuracy_by_size(found, settings)
    counts = sorted({m for points in by_size.values() for m in points})
    rows = [
        [TITLES[kind], *(f"{points[m]:.1f}" if m in points else "" for m in counts)] for kind, points in by_size.items()
    ]
    losses = found["losses"]
    rows.append(["*relative loss of the paper's AE*", *(_loss(losses, "ae_adam", m) for m in counts)])
    rows.append(["*relative loss, balanced*", *(_loss(losses, "balanced", m) for m in counts)])
    return table(["task arithmetic over", *(f"M = {m}" for m in counts)], rows)


def _loss(losses: Answers, kind: str, num_bases: int) -> str:
    cell = losses.of(kind=kind, num_bases=num_bases)
    return f"*{cell[0]['loss']:.3f}*" if cell else "*0*"


def accuracy_by_size(found: Found, settings: Settings) -> dict[str, dict[int, float]]:
    """Task arithmetic: {kind: {M: accuracy}}, the first fine-tuning seed."""
    seed, total = settings.seeds[0], len(settings.tasks)
    everything = average(found["addition"], method="task_arithmetic", kind=ALL, seed=seed)
    points: dict[str, dict[int, float]] = {}
    for kind in MAIN:
        by_m: dict[int, list[float]] = {}
        for question, answer in found["addition"]:
            wanted = ("task_arithmetic", kind, "bases", seed)
            if tuple(question[key] for key in ("method", "kind", "over", "seed")) == wanted:
                by_m.setdefault(question["num_bases"], []).append(answer["accuracy"])
        for question, answer in found["sizes"]:
            if question["kind"] == kind:
                by_m.setdefault(question["num_bases"], []).append(answer["accuracy"])
        points[kind] = {m: statistics.mean(values) for m, values in sorted(by_m.items())} | {total: everything}
    return points


def temperature(found: Found, settings: Settings) -> str:
    rows = [
        [
            f"{q['temperature']:g}",
            f"{a['accuracy']:.1f} (α {a['alpha']:g})",
            f"{100 * (a['loss'] / a['bound'] - 1):.3f} %",
            f"{a['effective'][0]:.2f}–{a['effective'][1]:.2f}",
            paper.TEMPERATURE.get(q["temperature"], ""),
        ]
        for q, a in found["temperature"]
    ]
    headers = ["temperature", "task arithmetic", "loss above the bound", "weights of the tasks", "paper (normalised)"]
    return table(headers, rows)


def subsamples(found: Found, settings: Settings) -> str:
    ((_, answer),) = found["subsamples"]
    rows = [[count, f"{mean:.1f} ± {deviation:.1f}"] for count, (mean, deviation) in answer["by_count"].items()]
    return table(["validation sentences per task", "test accuracy"], rows) + (
        f"\n\nThe best alpha for the test sentences themselves would give {answer['best']:.1f}."
    )
