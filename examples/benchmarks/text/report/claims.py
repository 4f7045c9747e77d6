"""What has to be true for the papers' and our own claims, and whether it is: computed, never written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from evidence.claims import Claim
from evidence.runner import Answers

from ..settings import Settings

FORGOTTEN, UNTOUCHED = 10.0, 2.0
"""Points of the target: what counts as forgotten clearly, and as not at all."""


def claims(found: Mapping[str, Answers], settings: Settings) -> list[Claim]:
    """All that the answers at hand can decide."""
    listed = [*_addition(found["addition"], found["finetune"], settings)]
    if "online" in found:
        listed += _online(found["online"])
    if "negation" in found:
        listed += _negation(found["negation"])
    return listed


def average(answers: Answers, **wanted: object) -> float:
    """Mean accuracy over fine-tuning seeds and draws."""
    return statistics.mean(answer["accuracy"] for answer in answers.of(**wanted))


def _addition(found: Answers, tuned: Answers, settings: Settings) -> list[Claim]:
    def accuracy(method: str, kind: str, m: int = len(settings.tasks), over: str = "bases") -> float:
        return average(found, method=method, kind=kind, num_bases=m, over=over)

    half, quarter = settings.num_bases
    ta, ties, tsv = "task_arithmetic", "ties", "tsv"
    zero_shot = statistics.mean(a["zero_shot"] for a in merged_tasks(tuned, settings))
    everything = {method: accuracy(method, "all") for method in (ta, ties, tsv)}
    best_tsv = max(accuracy(tsv, "balanced", half), accuracy(tsv, "balanced", half, "reconstructions"))

    def ahead(method: str, first: str, second: str, m: int) -> float:
        return accuracy(method, first, m) - accuracy(method, second, m)

    listed = [
        Claim("task arithmetic over all vectors gains over zero-shot", everything[ta] - zero_shot, 10),
        Claim("TSV-M is ahead of task arithmetic, all vectors", everything[tsv] - everything[ta], 1.5),
        *(Claim(f"AE is ahead of RandSelect, task arithmetic, M = {m}", ahead(ta, "ae_adam", "rand_select", m), points)
          for m, points in ((half, 1.5), (quarter, 3))),
        *(Claim(f"RandSelect is ahead of PCA, task arithmetic, M = {m}", ahead(ta, "rand_select", "pca", m), 4)
          for m in settings.num_bases),
        Claim(f"task arithmetic over balanced AE, M = {quarter}, is behind all vectors by",
              everything[ta] - accuracy(ta, "balanced", quarter), 0.7, at_most=True),
        *(Claim(f"balanced AE is ahead of the paper's AE, {title}, M = {quarter}",
                ahead(method, "balanced", "ae_adam", quarter), 1.5)
          for method, title in ((ta, "task arithmetic"), (ties, "TIES"))),
        Claim(f"TSV-M over balanced AE (bases or reconstructions), M = {half}, is behind all vectors by",
              everything[tsv] - best_tsv, 3, at_most=True),
    ]  # fmt: skip
    return listed


def merged_tasks(tuned: Answers, settings: Settings, kind: str = "full") -> list[dict]:
    """Answers about the fine-tunes of the tasks that are merged."""
    return [a for q, a in tuned if q["task"] in settings.tasks and q["kind"] == kind]


def _online(found: Answers) -> list[Claim]:
    def deviation(method: str) -> float:
        return statistics.stdev(a["accuracy"]["task_arithmetic"] for a in found.of(method=method))

    random = deviation("rand_select")
    return [
        Claim(f"online, task arithmetic: {title} varies over the orders by less than RandSelect ({random:.2f})",
              deviation(method), random, at_most=True)
        for method, title in (("ae_paper", "the paper's AE"), ("ae", "balanced AE"))
    ]  # fmt: skip


def _negation(found: Answers) -> list[Claim]:
    def forgotten(kind: str) -> float:
        return statistics.mean(a["target_before"] - a["target"] for a in found.of(kind=kind))

    named: Mapping[str, str] = {"true": "the task vector", "pca": "PCA", "ae_adam": "the paper's AE"}
    listed = [Claim(f"negating {title} forgets the target by", forgotten(k), FORGOTTEN) for k, title in named.items()]
    listed.append(Claim("negating RandProj forgets the target by", forgotten("rand_proj"), UNTOUCHED, at_most=True))
    return listed
