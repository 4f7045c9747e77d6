"""Studies of shared and unique components (DeVec): how much is shared, against chance, and what merging gains.

``gains`` weighs all vectors, and all that pairs share, by one alpha: an experiment of ours. ``trained`` is the paper's
protocol, with a coefficient trained for each vector and for what each pair shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from evidence.runner import Answer, Question, Study

from tvbases_hf.algebra.products import square_norm
from tvbases_hf.learning.adamerging import START as DEVEC_START
from tvbases_hf.learning.adamerging import adamerging, with_shared
from tvbases_hf.learning.atlas import atlas
from tvbases_hf.learning.devec import LEARNING_RATE, devec
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.devec import Options, chance_share, column_space, project, shared_subspace
from tvbases_hf.models.vectors import Vectors

from .kinds import ALL, vectors_of
from .ood import few
from .settings import START, Settings
from .workshop import Workshop, start_of

THRESHOLDS = (0.5, 0.7, 0.85)
RANK_RULES = ("fraction:0.05", "fraction:0.1", "fraction:0.3", "energy:0.5", "gavish-donoho")
ATTENTION = ("query.weight", "value.weight", "output.dense.weight")
"""One kind of each matrix of a block is enough to see the shares; all of them take minutes."""
STEPS = 25
PUBLISHED = ("fraction:0.3", 0.85)
SWEPT_RANKS = ("fraction:0.1", "fraction:0.3")
COMPONENTS = (("fraction:0.1", 0.5), ("fraction:0.3", 0.85))


def fractions(settings: Settings) -> Iterator[Question]:
    for kind in ("full", "lora"):
        for rule in RANK_RULES if kind == "full" else ("numerical",):
            yield {"kind": kind, "rule": rule}


def shared_fraction(workshop: Workshop, question: Question) -> Answer:
    """Share of the pairs' energy above each threshold, and the share that random subspaces of their ranks have."""
    vectors = workshop.vectors(0, question["kind"])
    pairs = list(itertools.combinations(range(len(vectors)), 2))
    names = [n for n in vectors.names if n.endswith(ATTENTION) and "embeddings" not in n]
    rank = "energy:0.9999" if question["rule"] == "numerical" else question["rule"]
    shared, chance = (dict.fromkeys(THRESHOLDS, 0.0) for _ in range(2))
    total, ranks, rows = 0.0, [], []
    for name in names:
        deltas = vectors.deltas(name)
        spaces = [column_space(delta, rank) for delta in deltas]
        energy = [square_norm(delta) for delta in deltas]
        ranks += [space.shape[1] for space in spaces]
        rows.append(spaces[0].shape[0])
        for i, j in pairs:
            total += energy[i] + energy[j]
            for threshold in THRESHOLDS:
                common = shared_subspace([spaces[i], spaces[j]], threshold, "angles")
                shared[threshold] += sum(square_norm(project(common, deltas[k])) for k in (i, j))
    typical = round(sum(ranks) / len(ranks)), round(sum(rows) / len(rows))
    for threshold in THRESHOLDS:
        chance[threshold] = chance_share(typical[1], (typical[0], typical[0]), threshold, "angles")
    return {
        "rank": typical[0],
        "rows": typical[1],
        "shared": {str(t): shared[t] / total for t in THRESHOLDS},
        "chance": {str(t): chance[t] for t in THRESHOLDS},
    }


def gains(settings: Settings) -> Iterator[Question]:
    for method in ("task_arithmetic", "adamerging"):
        yield {"method": method, "components": "none", "rank": None, "threshold": None}
        for rank, threshold in COMPONENTS if method == "task_arithmetic" else COMPONENTS[:1]:
            yield {"method": method, "components": "shared", "rank": rank, "threshold": threshold}


def gain(workshop: Workshop, question: Question) -> Answer:
    """Merging the vectors alone, or with the shared component of every pair as more vectors (Table 1)."""
    vectors = vectors_of(workshop, ALL)
    if question["components"] == "shared":
        options = Options(pool="pairs", rank=question["rank"], threshold=question["threshold"])
        vectors = with_shared(vectors, options)
    if question["method"] == "task_arithmetic":
        return _summed(workshop, vectors)
    count = min(64, workshop.settings.validation)
    data = workshop.data(vectors.tasks, count=count)
    found = adamerging(vectors, workshop.model, data, start=_starts(vectors), lr=1e-2, steps=STEPS)
    test = workshop.changed(found.change)
    return {"accuracy": sum(test.values()) / len(test), "alpha": 1.0}


def protocols(settings: Settings) -> Iterator[Question]:
    """Table 1 (all tasks), Table 2 (unseen tasks), Table 3 (one vector left out), and the sweeps of its choices."""
    base = {"components": "pairs", "rank": PUBLISHED[0], "threshold": PUBLISHED[1], "left_out": None, "task": None}
    for components in ("none", "pairs"):
        yield base | {"components": components}
        for task in settings.unseen:
            yield base | {"components": components, "task": task}
        for task in settings.tasks if settings.everything else settings.tasks[:2]:
            yield base | {"components": components, "left_out": task}
    for rank, threshold in itertools.product(SWEPT_RANKS, THRESHOLDS):
        if (rank, threshold) != PUBLISHED:
            yield base | {"rank": rank, "threshold": threshold}


def trained(workshop: Workshop, question: Question) -> Answer:
    """A coefficient for each vector, and each pair's shared component, trained on a few labelled sentences.

    ``left_out``: the vector of this task is not there, its sentences are, and its accuracy is the answer's ``own``.
    ``task``: the few sentences, and the accuracy, are those of a task that nobody has a vector for.
    """
    vectors, out, task = vectors_of(workshop, ALL), question["left_out"], question["task"]
    if out:
        vectors = vectors.selected([i for i, name in enumerate(vectors.labels) if name != out])
    data = [few(workshop, name, workshop.settings.shots, 0) for name in ([task] if task else workshop.settings.tasks)]
    if question["components"] == "pairs":
        options = Options(pool="pairs", rank=question["rank"], threshold=question["threshold"])
        found = devec(vectors, workshop.model, data, options=options)
    else:
        found = atlas(vectors, workshop.model, data, per="task", start=DEVEC_START, lr=LEARNING_RATE, weight_decay=0.0)
    test = workshop.changed(found.change, tasks=[task] if task else None)
    own = {"own": test[out]} if out else {}
    return {"accuracy": sum(test.values()) / len(test), "coefficients": found.values[:, 0].tolist(), **own}


def _summed(workshop: Workshop, vectors: Vectors) -> Answer:
    tuned = workshop.tuned(merged(vectors, "task_arithmetic"), start_of(len(vectors.tasks), len(vectors.tasks)))
    return {"accuracy": tuned.mean, "alpha": tuned.alpha}


def _starts(vectors: Vectors) -> list[float]:
    """The vectors as in task arithmetic, and nothing of the shared components: learning adds them."""
    tasks = len(vectors.tasks)
    return [START] * tasks + [0.0] * (len(vectors) - tasks)


FRACTIONS = Study("fractions", fractions, shared_fraction)
GAINS = Study("gains", gains, gain)
TRAINED = Study("devec_trained", protocols, trained)
