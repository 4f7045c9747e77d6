"""Study: what merges lose on the tasks: the words' order for a prompt, or only how likely each word is at all?

Batch calibration (Zhou et al., 2023; no labels are used) takes a word's mean log-likelihood over the prompts off; where
that gives the lost accuracy back, the merge still tells the prompts apart and has only moved the threshold.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from evidence.runner import Answer, Question, Study

from tvbases_hf.learning.inplace import InPlace

from . import addition
from .merges import METHODS, opened
from .settings import Settings
from .tasks import task_name
from .workshop import BATCH, Workshop, mean

MERGES = {"tsv": 1.0, "task_arithmetic": 0.6, "iso_c": 3.0, "ties": 1.25}
"""At these alphas, which the first run chose."""
Scores = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
TITLES = {"base": "the base", "own": "own adapters"} | {name: METHODS[name].title for name in MERGES}


def questions(settings: Settings) -> Iterator[Question]:
    return ({"model": name, "seed": settings.seeds[0]} for name in ("own", "base", *MERGES))


def answer(workshop: Workshop, question: Question) -> Answer:
    scores = scored(workshop, question["model"], question["seed"])
    plain = {task: _right(found, labels) for task, (found, labels) in scores.items()}
    calibrated = {task: _right(found - found.mean(dim=0), labels) for task, (found, labels) in scores.items()}
    return {"accuracy": mean(plain), "calibrated": mean(calibrated), "tasks": plain, "tasks_calibrated": calibrated}


def scored(workshop: Workshop, model: str, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By task: log-likelihoods [prompts, words] and the right words [prompts]."""
    tasks = workshop.settings.tasks
    if model == "base":
        return asked(workshop, workshop.model, tasks)
    if model == "own":
        vectors = workshop.vectors(seed)
        place, found = InPlace(workshop.model, vectors.names), {}
        for index, task in enumerate(tasks):
            with place.changed(lambda name, k=index: vectors.deltas(name)[k]) as tuned:
                found |= asked(workshop, tuned, [task])
        return found
    merge = opened(workshop, addition.ask(model, seed=seed))
    with InPlace(workshop.model, merge.names).changed(functools.cache(merge.change), MERGES[model]) as merged:
        return asked(workshop, merged, tasks)


def asked(workshop: Workshop, model: Any, tasks: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """lm-eval's own answers to the test prompts, with its log of samples."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    names = {task_name(task): task for task in tasks}
    wrapper: Any = HFLM
    loaded: Any = dict(workshop.session(tuple(names)).loaded)
    with contextlib.redirect_stderr(io.StringIO()):  # its bars
        host = wrapper(pretrained=model, tokenizer=workshop.tokenizer, batch_size=BATCH)
        results: Any = evaluate(host, loaded, bootstrap_iters=0, log_samples=True)
    return {task: _table(results["samples"][name]) for name, task in names.items()}


def _table(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = [[float(likelihood) for likelihood, _ in sample["filtered_resps"]] for sample in samples]
    return torch.tensor(scores), torch.tensor([int(sample["target"]) for sample in samples])


def _right(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((scores.argmax(dim=1) == labels).double().mean())


STUDY = Study("causes", questions, answer)
