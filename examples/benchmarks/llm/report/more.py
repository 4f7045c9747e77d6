"""The tables on what is written, what is lost, the number of tasks, and basis directories."""

from __future__ import annotations

import statistics
from typing import Any

from evidence.markdown import table
from evidence.runner import Answers

from .. import causes as why
from .. import spoilt as bad
from ..merges import ALL, METHODS
from ..settings import Settings
from .claims import Found, average
from .tables import title_of


def written(found: Found, settings: Settings) -> str:
    rows = [
        [
            title_of(question),
            answer["rank"],
            f"{answer['bytes'] / 1e6:.0f}",
            f"{answer['command_processor_seconds']:.0f}",
            f"{answer['memory'] / 1e9:.1f}",
        ]
        for question, answer in found["written"]
    ]
    return table(["merge", "rank", "MB", "processor seconds", "memory, GB"], rows)


def causes(found: Found, settings: Settings) -> str:
    answers = found["causes"]
    tasks = [task for task in settings.tasks if all(task in a["tasks"] for _, a in answers)]
    rows = [
        [
            why.TITLES[question["model"]],
            f"{answer['accuracy']:.1f}",
            f"**{answer['calibrated']:.1f}**",
            *(f"{answer['tasks'][t]:.0f} → {answer['tasks_calibrated'][t]:.0f}" for t in tasks),
        ]
        for question, answer in answers
    ]
    return table(["model", "accuracy", "calibrated", *tasks], rows) + _cause(answers)


def _cause(answers: Answers) -> str:
    """How far TSV-Merge is behind the own adapters, before and after the calibration of both."""
    models = {question["model"]: answer for question, answer in answers}
    if not {"own", "tsv"} <= models.keys():
        return ""
    plain, calibrated = (models["own"][kind] - models["tsv"][kind] for kind in ("accuracy", "calibrated"))
    place = "behind" if calibrated > 0 else "ahead"
    return (
        f"\n\nTSV-Merge at 1 is {plain:.1f} points behind the own adapters, and {abs(calibrated):.1f} {place} once "
        "both are calibrated: the rest was lost to the words' odds, not to telling prompts apart."
    )


def spoilt(found: Found, settings: Settings) -> str:
    """By method: what the other tasks are worth with every kind of first adapter, and the first task itself."""
    rows, answers = [], found["spoilt"]
    for method in why.MERGES:
        cells = []
        for kind in bad.TITLES:
            own = answers.of(method=method, first=kind)
            cells.append(f"{average([a['accuracy'] for a in own]):.1f}" if own else "")
            cells.append(f"{average([a['first'] for a in own]):.0f}" if own else "")
        rows.append([f"{METHODS[method].title}, α = {why.MERGES[method]:g}", *cells])
    first = settings.tasks[0]
    header = [cell for title in bad.TITLES.values() for cell in (f"{title}: others", first)]
    moved = answers.of(first=bad.ELSEWHERE)
    told = f"\n\nThe other base differs from the base by {moved[0]['moved']:.1%} of its norm." if moved else ""
    return table(["merge", *header], rows) + told


def by_count(found: Found, settings: Settings) -> str:
    """What merging costs per task, against the number of tasks."""
    tuned, methods = found["finetune"], ("task_arithmetic", "tsv")
    alone = {q["task"]: a for q, a in tuned if q["kind"] == "lora" and q["seed"] == settings.seeds[0]}
    counts = {q["count"] for q, _ in found["counts"]}
    rows = []
    for count in sorted({*counts, len(settings.tasks)}):
        chosen = settings.tasks[:count]
        mean = average([alone[task]["accuracy"] for task in chosen if task in alone])
        cells = [_counted(found, settings, method, count) for method in methods]
        rows.append(
            [count, f"{mean:.1f}", *(cell and f"{cell['accuracy']:.1f} (α {cell['alpha']:g})" for cell in cells)]
        )
    return table(["tasks", "own adapters", *(METHODS[m].title for m in methods)], rows)


def _counted(found: Found, settings: Settings, method: str, count: int) -> Any:
    if count != len(settings.tasks):
        cells = found["counts"].of(method=method, count=count)
    else:
        wanted = {"method": method, "kind": ALL, "seed": settings.seeds[0], "adapters": None}
        cells = found["addition"].of(**wanted, alpha=None) if "addition" in found else []
    return cells[0] if cells else ""


def budgets(found: Found, settings: Settings) -> str:
    """Own accuracy of every task against the bytes of the directory."""
    answers: Answers = found["budgets"]
    tuned = [a for q, a in found["finetune"] if q["kind"] == "lora" and q["seed"] == settings.seeds[0]]
    whole = sum(a["bytes"] for a in tuned)
    rows = [["the adapters", "", f"{whole / 1e6:.1f}", "", f"{statistics.mean(a['accuracy'] for a in tuned):.1f}"]]
    for question, answer in sorted(answers, key=lambda pair: (-pair[0]["share"], pair[0]["method"])):
        rows.append([
            f"{question['share']:.0%}, {question['method']}",
            answer["chosen"],
            f"{answer['bytes'] / 1e6:.1f}",
            f"{answer['error']:.4f}",
            f"{answer['accuracy']:.1f}",
        ])  # fmt: skip
    return table(["basis", "kept as", "MB", "squared error", "own accuracy"], rows)


def served(found: Found, settings: Settings) -> str:
    answer = next(a for _, a in found["served"])
    rows = [
        ["`select`, one task after another", f"{answer['select']:.1g}"],
        ["`mixed`, all tasks in one batch", f"{answer['mixed']:.1g}"],
        ["the directory in stock PEFT, against the sum", f"{answer['stock']:.1g}"],
        ["*standard deviation of a logit*", f"{answer['range']:.2g}"],
    ]
    return table(["way to serve a basis", "largest difference of a logit"], rows)
