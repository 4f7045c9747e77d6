"""Studies of task singular vectors: TSV-Merge's parts and rank (TSV paper, Table 4), TSV-Compress against bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from evidence.runner import Answer, Question, Study

from tvbases_hf.algebra.rank import RankRule
from tvbases_hf.basis.ranks import Spectra, ranks_by_budget, ranks_by_rule, spectra
from tvbases_hf.learning.inplace import Change
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.tsv import truncate

from .kinds import ALL, vectors_of
from .settings import Settings
from .workshop import Workshop

PARTS = {
    "neither (the sum)": {"low_rank": False, "orthogonalize": False},
    "low rank only": {"orthogonalize": False},
    "orthogonal only": {"low_rank": False},
    "both": {},
}
RANKS = (0.03, 0.0625, 0.25)  # 1 / T = 0.125 is the method itself
BUDGETS = (0.05, 0.1, 0.25)
RULES = ("fraction:0.03", "fraction:0.125", "energy:0.5", "gavish-donoho")


def ablation(settings: Settings) -> Iterator[Question]:
    yield from ({"parts": parts, "rank": None} for parts in PARTS)
    yield from ({"parts": "both", "rank": rank} for rank in RANKS)


def merged_accuracy(workshop: Workshop, question: Question) -> Answer:
    """With the paper's alpha of 1, and with the alpha that validation sentences choose."""
    options = PARTS[question["parts"]] | ({"rank": question["rank"]} if question["rank"] else {})
    tuned = workshop.tuned(merged(vectors_of(workshop, ALL), "tsv", **options), 1.0)
    at_one = workshop.changed(merged(vectors_of(workshop, ALL), "tsv", **options))
    return {"accuracy": tuned.mean, "alpha": tuned.alpha, "at_one": sum(at_one.values()) / len(at_one)}


def compression(settings: Settings) -> Iterator[Question]:
    yield from ({"rule": rule, "budget": None} for rule in RULES)
    yield from ({"rule": None, "budget": budget} for budget in BUDGETS)


def compressed_accuracy(workshop: Workshop, question: Question) -> Answer:
    """Every task's own accuracy with its truncated vector, and what share of the bytes these have."""
    vectors = workshop.vectors()
    found = spectra(vectors)
    if question["budget"]:
        ranks = ranks_by_budget(found, vectors, question["budget"])
    else:
        ranks = ranks_by_rule(found, RankRule.parse(question["rule"]), len(vectors))
    own = {
        task: workshop.changed(truncated(workshop, ranks, index), tasks=[task])[task]
        for index, task in enumerate(workshop.settings.tasks)
    }
    return {"accuracy": sum(own.values()) / len(own), "tasks": own, "share": share_of_bytes(found, ranks)}


def truncated(workshop: Workshop, ranks: Mapping[str, list[int]], index: int) -> Change:
    vectors = workshop.vectors()

    def change(name: str):
        delta = vectors.deltas(name)[index]
        if name not in ranks:
            return delta
        return truncate(delta, ranks[name][index]) if ranks[name][index] else truncate(delta, 1)

    return change


def share_of_bytes(found: Spectra, ranks: Mapping[str, list[int]]) -> float:
    """Of the matrices' numbers: sum of k (n + m) over that of n m; where factors are no gain the matrix is kept."""
    kept = total = 0
    for name, (rows, columns) in found.shapes.items():
        count = len(found.matrices[name])
        total += rows * columns * count
        kept += sum(k * (rows + columns) for k in ranks[name]) if name in ranks else rows * columns * count
    return kept / total


def untuned(settings: Settings) -> Iterator[Question]:
    """Alpha 1, the paper's, and T / M, which makes up for bases that are shorter than task vectors."""
    for kind in ("balanced", "ae_adam", "rand_select"):
        for draw in range(min(settings.draws, 3) if kind == "rand_select" else 1):
            for alpha in (1.0, len(settings.tasks) / settings.half):
                yield {"kind": kind, "num_bases": settings.half, "alpha": alpha, "draw": draw}


def untuned_accuracy(workshop: Workshop, question: Question) -> Answer:
    vectors = vectors_of(workshop, question["kind"], question["num_bases"], draw=question["draw"])
    test = workshop.changed(merged(vectors, "tsv"), question["alpha"])
    return {"accuracy": sum(test.values()) / len(test)}


UNTUNED = Study("untuned", untuned, untuned_accuracy)
ABLATION = Study("ablation", ablation, merged_accuracy)
COMPRESSION = Study("compression", compression, compressed_accuracy)
