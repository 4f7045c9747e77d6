"""Studies of basis directories: every task's own accuracy against bytes, and whether PEFT serves the same answers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from evidence.runner import Answer, Question, Study

from tvbases_hf.algebra.delta import Delta
from tvbases_hf.algebra.sums import total
from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.storage.output import transaction

from . import models
from .settings import Settings
from .workshop import Workshop, mean

SHARES = (0.5, 0.1, 0.25, 0.75)
CHOSEN = "chosen"
METHODS = (CHOSEN, "tsv", "ae")


def questions(settings: Settings) -> Iterator[Question]:
    """``chosen``: what loses least within that share of the bytes; ``tsv``: every adapter truncated alone."""
    for share in SHARES:
        for method in METHODS[:2]:
            yield {"method": method, "share": share, "kind": "lora", "seed": settings.seeds[0]}
    yield {"method": "ae", "share": SHARES[0], "kind": "lora", "seed": settings.seeds[0]}


def built(workshop: Workshop, question: Question) -> Basis:
    method = None if question["method"] == CHOSEN else question["method"]
    return Basis.build(workshop.vectors(question["seed"], question["kind"]), method=method, budget=question["share"])


def answer(workshop: Workshop, question: Question) -> Answer:
    basis, vectors = built(workshop, question), workshop.vectors(question["seed"], question["kind"])
    stored = sum(
        f.stat().st_size
        for task in vectors.tasks
        for f in workshop.path(task, question["seed"], question["kind"]).glob("*.safetensors")
    )
    used = sum(tensor.nbytes for tensor in basis.tensors.values())
    place, own = InPlace(workshop.model, vectors.names), {}
    for index, task in enumerate(vectors.tasks):
        with place.changed(lambda name, k=index: basis.reconstructions(name, vectors.base)[k]) as model:
            own |= workshop.accuracies(model, "test", [task])[0]
    return {
        "accuracy": mean(own),
        "tasks": own,
        "bytes": used,
        "share": used / stored,
        "error": statistics.mean(e**2 for e in basis.info.task_error),
        "chosen": basis.info.method,
    }


def served_questions(settings: Settings) -> Iterator[Question]:
    yield {"share": 0.5, "method": CHOSEN, "kind": "lora", "seed": settings.seeds[0]}


@torch.inference_mode()
def served(workshop: Workshop, question: Question) -> Answer:
    """One prompt of every task: ``select``, ``mixed`` and a stock PEFT load against the weights changed in place."""
    folder = workshop.workdir / "basis"
    with transaction(folder, lambda path: (path / "basis_config.json").is_file()) as work:
        built(workshop, question).save_pretrained(work)
    basis = Basis.from_pretrained(folder)
    assert isinstance(basis, LoraBasis)
    tasks, vectors = basis.tasks, workshop.vectors(question["seed"], question["kind"])
    prompts = [workshop.tasks[task].splits["val"][0][0] for task in tasks]
    place = InPlace(workshop.model, vectors.names)
    separate, summed = [], []
    for index, prompt in enumerate(prompts):
        with place.changed(lambda name, k=index: basis.reconstructions(name, vectors.base)[k]) as model:
            separate.append(_last(workshop, model, [prompt])[0])
    with place.changed(lambda name: _sum(basis, name)) as model:
        summed = _last(workshop, model, prompts[:2])
    attached = basis.attach(workshop.model, task=tasks[0])
    selected = []
    for task, prompt in zip(tasks, prompts, strict=True):
        basis.select(attached, task)
        selected.append(_last(workshop, attached, [prompt])[0])
    with basis.mixed(attached, tasks):
        mixed = _last(workshop, attached, prompts)
    attached.unload()
    stock = _last(workshop, _stock(workshop, folder), prompts[:2])
    return {
        "select": _apart(separate, selected),
        "mixed": _apart(separate, mixed),
        "stock": _apart(summed, stock),
        "range": float(torch.stack(separate).std()),
    }


def _stock(workshop: Workshop, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(models.load(workshop.base)[0], str(folder)).eval()


def _sum(basis: LoraBasis, name: str) -> Delta:
    deltas = basis.deltas(name)
    return total(deltas, [1.0] * len(deltas))


def _last(workshop: Workshop, model: Any, prompts: list[str]) -> list[torch.Tensor]:
    inputs = workshop.tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    return list(model(**inputs, logits_to_keep=1).logits[:, -1])


def _apart(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest difference of two logits."""
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


STUDY = Study("budgets", questions, answer)
SERVED = Study("served", served_questions, served)
