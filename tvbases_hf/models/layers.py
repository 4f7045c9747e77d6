"""What the weight matrices say, group by group: interference, sharing and decay of the singular values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.products import square_norm
from ..algebra.svd import singular_values, svd
from ..methods.devec import MIN_SIDE, Options, chance_share, column_space, project, shared_subspace
from ..methods.tsv import default_rank
from ..storage.run import track
from .interference import Interference, Measuring
from .positions import groups_of
from .vectors import Vectors

DECAY_POINTS = 20
OPTIONS = Options()


@dataclass
class LayerReport:
    """Per group: summed STI; per pair of tasks: share of energy in the shared subspace, and by chance; decay curves.

    ``interference`` is the STI of the leading 1/T of the components; ``singular`` holds all other measures of it.
    ``decay`` holds, per task, the mean share of a matrix's energy in its leading 1/20, 2/20, ... of the components.
    """

    interference: dict[str, float] = field(default_factory=dict)
    singular: Interference = field(default_factory=Interference)
    shared: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    decay: dict[str, list[float]] = field(default_factory=dict)


def examine_layers(vectors: Vectors, options: Options = OPTIONS, merged: Vectors | None = None) -> LayerReport:
    """One pass over the matrices (those with both sides of at least MIN_SIDE); several SVDs each.

    ``merged``: the change of a merge over the same base, whose interference is measured too.
    """
    names = [n for n in vectors.names if len(s := vectors.base.tensors[n].shape) == 2 and min(s) >= MIN_SIDE]
    pairs = list(itertools.combinations(range(len(vectors)), 2))
    groups, report, singular = groups_of(vectors.base.tensors), LayerReport(), Measuring(merged)
    curves = torch.zeros(len(vectors), DECAY_POINTS, dtype=torch.float64)
    energy, found = torch.zeros(len(pairs), 2, dtype=torch.float64), torch.zeros(len(pairs), 2, dtype=torch.float64)
    for name in track(names, "Layers", lambda n: vectors.base.tensors[n].nbytes):
        deltas = vectors.deltas(name)
        parts = [svd(delta, default_rank(len(deltas))) for delta in deltas]
        singular.add(name, deltas, parts)
        curves += torch.stack([_decay(singular_values(delta).cpu()) for delta in deltas])
        spaces = [column_space(delta, options.rank) for delta in deltas]
        norms = [square_norm(delta) for delta in deltas]
        for index, (i, j) in enumerate(pairs):
            common = shared_subspace([spaces[i], spaces[j]], options.threshold, "angles")
            parts_energy = torch.tensor([square_norm(project(common, deltas[k])) for k in (i, j)], dtype=torch.float64)
            by_chance = _by_chance(spaces[i], spaces[j], options.threshold)
            weight = torch.tensor([norms[i], norms[j]], dtype=torch.float64)
            energy[index] += weight
            found[index] += torch.stack([parts_energy.sum(), by_chance * weight.sum()])
    report.singular = singular.report(groups)
    report.interference = {group: found["leading"] for group, found in report.singular.groups.items()}
    for index, (i, j) in enumerate(pairs):
        pair, total = f"{vectors.tasks[i]} / {vectors.tasks[j]}", float(energy[index].sum()) or 1.0
        report.shared[pair], report.chance[pair] = (float(value) / total for value in found[index])
    for task, curve in zip(vectors.tasks, curves / max(1, len(names)), strict=True):
        report.decay[task] = curve.tolist()
    return report


def _by_chance(a: Tensor, b: Tensor, threshold: float) -> float:
    """Share that random subspaces of about these ranks have in common, in steps of 2 % of the side: simulated once."""
    ranks = (max(1, round(50 * space.shape[1] / space.shape[0])) for space in (a, b))
    return chance_share(200, tuple(4 * rank for rank in ranks), threshold, "angles")


def _decay(values: Tensor) -> Tensor:
    """[DECAY_POINTS] cumulative share of energy at equal steps of the number of components."""
    energy = values.square().cumsum(0)
    ends = (torch.arange(1, DECAY_POINTS + 1) * len(values) / DECAY_POINTS).ceil().long().clamp(1, len(values)) - 1
    return energy[ends] / energy[-1].clamp_min(torch.finfo(torch.float64).tiny)
