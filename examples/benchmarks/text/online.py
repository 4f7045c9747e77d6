"""Study: tasks that come one after another, with memory for M vectors (AE paper, section 4.2.3, Table 16).

Every method sees the tasks in the same orders and merges with the alpha that the paper fixes beforehand.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evidence.runner import Answer, Question, Study

from tvbases_hf.basis.online import OnlineBasis

from . import models
from .settings import Settings
from .workshop import Workshop, mean

TITLES = {
    "ae": "AE, balanced",
    "ae_paper": "AE of the paper",
    "rand_select": "RandSelect",
    "ta": "continual task arithmetic",
    "ties": "continual TIES",
    "magmax": "MagMax",
    "opcm": "OPCM",
}
BUFFERED = ("ae", "ae_paper", "rand_select")
# Of the running merges: sums and maxima do not depend on the order.
ORDERS = {"ta": 1, "magmax": 1, "ties": 2, "opcm": 2}
OPTIONS = {"ae_paper": {"solver": "adam", "balance": False, "temperature": 5.0, "anneal": 0.8}}
UNTUNED = {"task_arithmetic": 0.3, "tsv": 1.0}


def questions(settings: Settings) -> Iterator[Question]:
    for method in TITLES:
        for order in range(settings.orders if method in BUFFERED else ORDERS[method]):
            yield {"method": method, "num_bases": settings.half if method in BUFFERED else 1, "order": order}


def order_of(tasks: tuple[str, ...], number: int) -> list[str]:
    """The tasks in a random order; the first is the one they have."""
    return random.Random(number).sample(tasks, len(tasks)) if number else list(tasks)


def answer(workshop: Workshop, question: Question) -> Answer:
    method, num_bases = question["method"], question["num_bases"]
    base = models.base_model(workshop.workdir)
    with tempfile.TemporaryDirectory(dir=workshop.workdir) as scratch:
        online = OnlineBasis.create(
            Path(scratch) / "online",
            base,
            num_bases,
            method="ae" if method == "ae_paper" else method,
            seed=question["order"],
            **OPTIONS.get(method, {}),
        )
        for task in order_of(workshop.settings.tasks, question["order"]):
            online.add(task, workshop.path(task))
        found = {}
        for merge, alpha in UNTUNED.items():
            if method in BUFFERED or merge == "task_arithmetic":
                # what is merged already has its own length: 0.3 of the sum, all of an interference-free merge
                length = alpha if method in (*BUFFERED, "ta") else 1.0
                found[merge] = mean(workshop.changed(functools.cache(online.merged(merge, alpha=length))))
        size = sum(f.stat().st_size for f in (Path(scratch) / "online").rglob("*.safetensors"))
    return {"accuracy": found, "bytes": size}


STUDY = Study("online", questions, answer)
