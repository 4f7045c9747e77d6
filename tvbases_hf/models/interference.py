"""Singular task interference of all matrices of a model, before a merge and after it, and whose spaces overlap."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.components import SVD
from ..algebra.delta import Delta, zeros
from ..algebra.interference import interference, overlaps, own_interference
from ..algebra.sums import total
from ..algebra.svd import svd
from .positions import in_order
from .vectors import Vectors

SIDES = ("left", "right")


@dataclass
class Interference:
    """By matrix and by group: STI of the ``leading`` components and of the ``whole`` spectra (equation 7).

    Where a merge is given, also what the plain ``sum`` and the ``merged`` change do beside each task's own in that
    task's leading directions. ``overlap`` [T, T] of the leading left and right spaces, the mean over all matrices, and
    what random spaces of their sizes would have (``chance``).
    """

    matrices: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    overlap: dict[str, list[list[float]]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)


class Measuring:
    """Interference, added up matrix by matrix."""

    def __init__(self, merged: Vectors | None = None) -> None:
        """``merged``: one vector over the same base, the change of a merge."""
        self._merged = merged
        self._matrices: dict[str, dict[str, float]] = {}
        self._overlap: list[Tensor] = []
        self._chance: list[Tensor] = []

    def add(self, name: str, deltas: Sequence[Delta], leading: Sequence[SVD]) -> None:
        """One matrix and the leading components of each task's change."""
        found = {"leading": interference(leading), "whole": interference([svd(delta) for delta in deltas])}
        if self._merged:
            found["sum"] = own_interference(total(deltas, [1.0] * len(deltas)), leading)
            known = self._merged.deltas(name) if name in self._merged.names else [zeros(deltas[0].shape)]
            found["merged"] = own_interference(known[0], leading)
        self._matrices[name] = found
        sides = [[part.U for part in leading], [part.V for part in leading]]
        self._overlap.append(torch.stack([overlaps(side) for side in sides]).cpu())
        self._chance.append(torch.tensor([_by_chance(side) for side in sides], dtype=torch.float64))

    def report(self, groups: Mapping[str, str]) -> Interference:
        """``groups`` by name of the matrix."""
        by_group: dict[str, dict[str, float]] = {}
        for name, found in self._matrices.items():
            own = by_group.setdefault(groups[name], dict.fromkeys(found, 0.0))
            for kind, value in found.items():
                own[kind] += value
        if not self._matrices:
            return Interference()
        overlap, chance = torch.stack(self._overlap).mean(0), torch.stack(self._chance).mean(0)
        return Interference(
            self._matrices,
            in_order(by_group),
            dict(zip(SIDES, overlap.tolist(), strict=True)),
            dict(zip(SIDES, chance.tolist(), strict=True)),
        )


def _by_chance(spaces: Sequence[Tensor]) -> float:
    """The mean overlap of two random spaces of these sizes."""
    rows, sizes = spaces[0].shape[0], [space.shape[1] for space in spaces]
    pairs = list(itertools.combinations(sizes, 2))
    return sum(max(pair) / rows for pair in pairs) / max(1, len(pairs))
