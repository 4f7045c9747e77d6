"""Studies: PEFT's own combinations of adapters, and merges of fewer tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from evidence.runner import Answer, Question, Study

from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.output import transaction

from . import addition, models
from .settings import Settings
from .workshop import Workshop

# {combination_type: (title, where the search for alpha begins, more arguments)}
PEFT = {
    "linear": ("linear, PEFT's default", 0.4, {}),
    "svd": ("svd, rank 16", 0.6, {"svd_rank": 16}),
    "ties": ("ties, density 0.2", 1.25, {"density": 0.2}),
    "dare_ties": ("dare_ties, density 0.5", 0.6, {"density": 0.5}),
    "magnitude_prune": ("magnitude_prune, density 0.5", 0.5, {"density": 0.5}),
}
COUNTS = (2, 4, 6, 10, 12)
"""Beyond the tasks, adapters of the text domains are merged too."""


def combinations(settings: Settings) -> Iterator[Question]:
    return ({"method": method, "seed": settings.seeds[0]} for method in PEFT)


def combined(workshop: Workshop, question: Question) -> Answer:
    """The adapter that PEFT's add_weighted_adapter makes with weights 1, at the best alpha times its change."""
    method, seed = question["method"], question["seed"]
    folder, began = workshop.workdir / "peft" / f"{method}-{seed}", time.perf_counter()
    with transaction(folder, lambda path: (path / "combined").is_dir()) as work:
        _model_of_all(workshop, seed, method).save_pretrained(str(work), selected_adapters=["combined"])
    merging = time.perf_counter() - began
    vectors = Vectors.open(workshop.base, {"combined": folder / "combined"})
    found = workshop.worth(vectors.names, lambda name: vectors.deltas(name)[0], start=PEFT[method][1], abilities=True)
    return found | {"merging_seconds": merging}


def _model_of_all(workshop: Workshop, seed: int, method: str) -> Any:
    from peft import PeftModel

    paths = {task: str(workshop.path(task, seed)) for task in workshop.settings.tasks}
    (first, path), *others = paths.items()
    model = PeftModel.from_pretrained(models.load(workshop.base)[0], path, adapter_name=first)
    for task, path in others:
        model.load_adapter(path, adapter_name=task)
    model.add_weighted_adapter(
        list(paths), [1.0] * len(paths), adapter_name="combined", combination_type=method, **PEFT[method][2]
    )
    return model


def counted(settings: Settings) -> Iterator[Question]:
    most = len(settings.tasks) + (len(settings.domains) if settings.asks("kinds") else 0)
    for count in (c for c in COUNTS if c <= most and c != len(settings.tasks)):
        for method in ("task_arithmetic", "tsv"):
            yield addition.ask(method, seed=settings.seeds[0], count=count)


def with_fewer(workshop: Workshop, question: Question) -> Answer:
    """The merge of the first tasks alone, on these; of more, the text domains are no tasks but are read."""
    merge = addition.opened(workshop, question)
    start = addition.METHODS[question["method"]].start
    count, tasks = question["count"], workshop.settings.tasks
    return workshop.worth(merge.names, merge.change, start=start, chosen=tasks[:count], abilities=count > len(tasks))


COMBINED = Study("peft", combinations, combined)
COUNTED = Study("counts", counted, with_fewer)
