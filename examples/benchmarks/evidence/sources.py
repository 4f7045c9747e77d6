"""Where the tasks come from: a file, the Hub, or (for the tests) the demo's generator.

A task is {"labels": [description, ...], "train" | "val" | "test": [[text, label index], ...]}.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvbases_demo.tasks import TASKS, make_task
from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError

Task = dict[str, Any]
FILE = "tasks.json.gz"
SPLITS = ("train", "val", "test")
SIZES = {"train": 2000, "val": 200, "test": 600}


@dataclass(frozen=True)
class HubTask:
    """A data set of the Hub: its id, the columns of text and label, and what the labels say to a zero-shot head.

    ``labels`` describe the values of the label column in order; None: "Customer question about NAME." of its names.
    """

    id: str
    text: str
    label: str
    labels: tuple[str, ...] | None
    config: str | None = None


# Parts of the tasks of many labels, by pairs of labels or by domains: (the whole, the labels that stay).
PARTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "trec_definitions": ("trec", (0, 1)),
    "trec_things": ("trec", (2, 3)),
    "trec_places": ("trec", (4, 5)),
    "news_events": ("agnews", (0, 1)),
    "news_trade": ("agnews", (2, 3)),
    "stars_extremes": ("sst5", (0, 4)),
    "stars_middle": ("sst5", (1, 3)),
    **{f"bank_{index}": ("bank", tuple(range(11 * index, 11 * index + 11))) for index in range(7)},
}
REVIEW = ("This is a negative {} review.", "This is a positive {} review.")
HUB: dict[str, HubTask] = {
    "cr": HubTask("SetFit/CR", "text", "label", tuple(text.format("product") for text in REVIEW)),
    "mpqa": HubTask(
        "rahulsikder223/SentEval-MPQA",
        "sentence",
        "label",
        ("This phrase expresses a negative opinion.", "This phrase expresses a positive opinion."),
    ),
    "mr": HubTask(
        "cornell-movie-review-data/rotten_tomatoes", "text", "label", tuple(text.format("movie") for text in REVIEW)
    ),
    "sst2": HubTask("SetFit/sst2", "text", "label", ("The critic hated this film.", "The critic loved this film.")),
    "subj": HubTask(
        "SetFit/subj",
        "text",
        "label",
        ("This is an objective description of a movie plot.", "This is a subjective opinion about a movie."),
    ),
    "trec": HubTask(
        "SetFit/TREC-QC",
        "text",
        "label_coarse_original",
        (
            "ABBR: This question asks about an abbreviation.",
            "DESC: This question asks for a description, definition or reason.",
            "ENTY: This question asks about a thing or entity.",
            "HUM: This question asks about a person or group.",
            "LOC: This question asks about a location or place.",
            "NUM: This question asks for a number, date or quantity.",
        ),
    ),
    "sst5": HubTask(
        "SetFit/sst5",
        "text",
        "label",
        (
            "The movie was terrible.",
            "The movie was bad.",
            "The movie was okay.",
            "The movie was good.",
            "The movie was excellent.",
        ),
    ),
    "agnews": HubTask(
        "fancyzhx/ag_news",
        "text",
        "label",
        (
            "This news article is about world politics.",
            "This news article is about sports.",
            "This news article is about business.",
            "This news article is about science and technology.",
        ),
    ),
    "sms": HubTask(
        "ucirvine/sms_spam",
        "sms",
        "label",
        ("This is a normal personal text message.", "This is a spam text message."),
    ),
    "bank": HubTask("mteb/banking77", "text", "label_text", None),
}


def load_tasks(names: Sequence[str], source: str) -> dict[str, Task]:
    """The tasks by name. ``source``: a file, ``hub``, ``generated``, or ``auto`` (a file if there is one, or hub).

    Raises:
        CheckpointError: a file that cannot be read, or that lacks a task.
        MissingExtraError: the Hub is asked for and ``datasets`` is not installed.
        ParameterError: the generator has no such task.
    """
    if source == "generated":
        unknown = [name for name in names if name not in TASKS]
        if unknown:
            raise ParameterError(f"the generator has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
        return {name: make_task(name) for name in names}
    file = found_file() if source == "auto" else None if source == "hub" else Path(source)
    whole = [name for name in names if name not in PARTS]
    needed = list(dict.fromkeys([*whole, *(PARTS[name][0] for name in names if name in PARTS)]))
    read = _from_hub(needed) if file is None else _from_file(needed, file)
    parts = split(read, {name: PARTS[name] for name in names if name in PARTS})
    return {name: parts[name] if name in parts else read[name] for name in names}


def split(tasks: Mapping[str, Task], parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Task]:
    """More tasks of fewer labels: {name: (task, its labels that stay)}; a part of labels is a task of its own.

    Labels are numbered anew. ParameterError for a task or a label that is not there, or fewer than two labels.
    """
    found = {}
    for name, (source, labels) in parts.items():
        task = tasks.get(source)
        if task is None or len(set(labels)) < 2 or max(labels) >= len(task["labels"]):
            raise ParameterError(f"{name}: {source} has no labels {', '.join(map(str, labels))} to make a task of")
        place = {label: index for index, label in enumerate(labels)}
        cut = {s: [[text, place[label]] for text, label in task[s] if label in place] for s in SPLITS}
        found[name] = {"labels": [task["labels"][label] for label in labels], **cut}
    return found


def found_file() -> Path | None:
    """The file of tasks in the directory that TVBASES_DATA names, or in a directory data/ beside the repository."""
    folder = os.environ.get("TVBASES_DATA")
    repository = Path(__file__).resolve().parents[3]
    files = [Path(folder) / FILE] if folder else sorted(repository.parent.glob(f"*/data/{FILE}"))
    return next((file for file in files if file.is_file()), None)


def digest(tasks: Mapping[str, Task]) -> str:
    """Of all texts and labels."""
    return hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest()[:12]


def _from_file(names: Sequence[str], file: Path) -> dict[str, Task]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            tasks = json.load(stream)
    except (OSError, ValueError) as error:
        raise CheckpointError(f'"{file}" cannot be read as tasks ({error})') from error
    missing = [name for name in names if name not in tasks]
    if missing:
        raise CheckpointError(f'"{file}" lacks {len(missing)} of {len(names)} tasks (first: {missing[0]})')
    return {name: tasks[name] for name in names}


def _from_hub(names: Sequence[str]) -> dict[str, Task]:
    """The data sets of the Hub, cut to SIZES; no text is in two splits or tasks."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(f'datasets is missing ({error}); pip install "tvbases-hf[eval]"') from error
    seen: set[str] = set()
    tasks = {}
    for name in names:
        hub = HUB[name]
        rows = load_dataset(hub.id, hub.config)
        tasks[name] = _cut(hub, {str(split): [dict(row) for row in rows[split]] for split in rows}, seen)
    return tasks


def _cut(hub: HubTask, rows: Mapping[str, list[dict[str, Any]]], seen: set[str]) -> Task:
    """SIZES sentences per split, shuffled by a fixed seed; a split that is absent is cut from the training part."""
    values = sorted({row[hub.label] for part in rows.values() for row in part})
    if hub.labels is None:
        labels = [f"Customer question about {str(value).replace('_', ' ')}." for value in values]
    elif isinstance(values[0], str):  # "VALUE: description"
        described = dict(text.split(": ", 1) for text in hub.labels)
        labels = [described[value] for value in values]
    else:
        labels = list(hub.labels)
    index = {value: place for place, value in enumerate(values)}
    rng = random.Random(0)
    parts = {"train": list(rows["train"]), "val": list(rows.get("validation", [])), "test": list(rows.get("test", []))}
    for part in parts.values():
        rng.shuffle(part)
    task: Task = {"labels": labels}
    for split in ("test", "val", "train"):
        # a data set without this part gives it of its training sentences, which `seen` then keeps out of training
        task[split] = _fresh(parts[split] or parts["train"], hub, index, seen, SIZES[split])
    return task


def _fresh(
    rows: Iterable[dict[str, Any]], hub: HubTask, index: Mapping[Any, int], seen: set[str], size: int
) -> list[list[Any]]:
    found: list[list[Any]] = []
    for row in rows:
        text = " ".join(str(row[hub.text]).split())
        if len(found) < size and text.lower() not in seen:
            seen.add(text.lower())
            found.append([text, index[row[hub.label]]])
    return found
