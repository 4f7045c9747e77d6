"""Study: LoRA and DoRA adapters in a basis of fewer bytes: every task's own accuracy, and the merged one."""

from __future__ import annotations

from collections.abc import Iterator

from evidence.runner import Answer, Question, Study

from tvbases_hf.algebra.sums import total
from tvbases_hf.basis import Basis

from .settings import Settings
from .workshop import Workshop, mean, start_of

BUDGETS = {"lora": (None, 0.75, 0.5, 0.25), "dora": (None, 0.5)}
METHODS = ("chosen", "tsv")


def questions(settings: Settings) -> Iterator[Question]:
    """``chosen``: the best within the budget; ``tsv``: every adapter truncated alone. No budget: the adapters."""
    for kind in ("lora", "dora"):
        for budget in BUDGETS[kind]:
            for method in METHODS if budget else ("none",):
                yield {"kind": kind, "budget": budget, "method": method}


def answer(workshop: Workshop, question: Question) -> Answer:
    kind, budget, method = question["kind"], question["budget"], question["method"]
    vectors = workshop.vectors(0, kind)
    size = sum(f.stat().st_size for t in vectors.tasks for f in workshop.path(t, 0, kind).glob("*.safetensors"))
    if budget is None:
        changes, errors, used, chosen = vectors.deltas, [0.0] * len(vectors), size, "adapters"
    else:
        basis = Basis.build(vectors, method=None if method == "chosen" else method, budget=budget)
        changes = lambda name: basis.reconstructions(name, vectors.base)  # noqa: E731
        errors, chosen = basis.info.task_error, basis.info.method
        used = sum(tensor.nbytes for tensor in basis.tensors.values())
    own = {
        task: workshop.changed(lambda name, i=i: changes(name)[i], tasks=[task], kind=kind)[task]
        for i, task in enumerate(vectors.tasks)
    }
    ones = [1.0] * len(vectors)
    merged = workshop.tuned(lambda name: total(changes(name), ones), start_of(len(vectors), len(vectors)), kind=kind)
    return {
        "own": mean(own),
        "tasks": own,
        "merged": merged.mean,
        "alpha": merged.alpha,
        "bytes": used,
        "share": used / size,
        "error": sum(e**2 for e in errors) / len(errors),
        "chosen": chosen,
    }


STUDY = Study("adapters", questions, answer)
