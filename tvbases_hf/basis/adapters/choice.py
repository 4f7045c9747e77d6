"""Which encodings of the adapters' changes fit a budget: per weight side by side, or over shared rows or columns.

Squared errors are sums over the tasks, each counted with its weight in the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.components import SVD
from ...algebra.delta import LowRank
from ...algebra.rank import RankRule
from ...bases import BasisWeights
from ...storage.run import track
from .budget import Menu, spend
from .codec import SIDES
from .cores import Cores, Shared, energies_within, largest, share_rows, shared_axes, widths
from .pool import Pool

# Energies below this share of the largest are what rounding leaves of an eigenvalue that is zero.
NOISE = 1e-13


@dataclass(frozen=True)
class Choice:
    """One weight's encoding: ``count`` components of all vectors, over ``width`` rows or columns of the shared side."""

    side: str
    width: int
    count: int


@dataclass(frozen=True)
class Plan:
    """How all weights are encoded.

    ``weights`` make the vectors out of the task vectors; ``shares`` [rows] are what a squared error of each vector
    counts. A weight without a choice takes the components that ``rule`` keeps of every vector. ``lost`` is the squared
    error before rounding where it is known: basis vectors are not orthogonal, so that theirs has to be measured.
    """

    weights: BasisWeights
    shares: Tensor
    choices: Mapping[str, Choice]
    rule: RankRule | None = None
    lost: float | None = None

    @property
    def row_weights(self) -> Tensor:
        """[T] what each task weighs in the sum of the vectors."""
        return self.weights.effective_weights

    @property
    def method(self) -> str:
        return self.weights.method

    @property
    def refits(self) -> bool:
        """Whether the decoder is fitted to the stored vectors; else every vector is one task."""
        return self.method not in ("tsv", "joint")

    def vectors(self, pool: Pool, name: str) -> list[LowRank] | Shared:
        """The vectors' parts of one weight before rounding, float64."""
        cores, choice = pool.cores(name), self.choices.get(name)
        if choice is not None and choice.side:
            oriented = cores if choice.side == "right" else cores.transposed()
            return share_rows(oriented, pool.weights, choice.width, choice.count)
        parts = [cores.combined(column) for column in self.weights.encoder.T]
        if choice is None:
            assert self.rule is not None
            ranks = [self.rule.of_spectrum(part.S, *pool.shape(name)) for part in parts]
        else:
            ranks = largest(_energies(parts, self.shares), choice.count)
        return [_balanced(cores, part.keep(rank)) for part, rank in zip(parts, ranks, strict=True)]


@dataclass(frozen=True)
class Survey:
    """What one pass over the adapters tells: inner products, common directions, and the menus of each weight."""

    gram: Tensor
    overlap: dict[str, float]
    alone: dict[str, Menu]
    joint: dict[str, Menu]


def survey(pool: Pool) -> Survey:
    """Menus of truncation alone and with shared rows and columns, the Gram matrix of the low-rank parts [T, T]."""
    count = len(pool)
    gram = torch.zeros(count, count, dtype=torch.float64)
    overlaps, alone, joint = [], {}, {}
    identity = torch.eye(count, dtype=torch.float64)
    for name in track(pool.names, "Singular values", lambda n: pool.vectors.base.tensors[n].nbytes):
        cores = pool.cores(name)
        gram += cores.gram()
        overlaps.append(_overlap(cores))
        menu = side_by_side(cores, identity, pool.weights, pool.dtype.itemsize, pool.has_dora)
        shared = [
            sharing(oriented, side, pool.weights, pool.dtype.itemsize)
            for side, oriented in (("right", cores), ("left", cores.transposed()))
        ]
        alone[name], joint[name] = menu, _together([menu, *shared]).pareto()
    return Survey(gram, _mean(overlaps), alone, joint)


def encoded_menus(pool: Pool, candidates: Sequence[BasisWeights]) -> list[dict[str, Menu]]:
    """Menus of the vectors of several encoders, side by side, in one pass."""
    found: list[dict[str, Menu]] = [{} for _ in candidates]
    for name in track(pool.names, "Singular values", lambda n: pool.vectors.base.tensors[n].nbytes):
        cores = pool.cores(name)
        for menus, weights in zip(found, candidates, strict=True):
            shares = vector_shares(weights, pool.weights)
            menus[name] = side_by_side(cores, weights.encoder, shares, pool.dtype.itemsize, pool.has_dora)
    return found


def vector_shares(weights: BasisWeights, tasks: Tensor) -> Tensor:
    """[rows] what a squared error of each vector counts: it enters task t with its decoder weight."""
    return weights.decoder.square() @ tasks


def choose(menus: Mapping[str, Menu], budget: float) -> tuple[dict[str, Choice], float]:
    """The choices that save most within ``budget`` bytes, and what they save."""
    names = list(menus)
    picked = spend([menus[name] for name in names], budget)
    chosen, gain = {}, 0.0
    for name, index in zip(names, picked, strict=True):
        side, width, count = (int(number) for number in menus[name].entries[index])
        chosen[name] = Choice(SIDES[side], width, count)
        gain += float(menus[name].gain[index])
    return chosen, gain


def side_by_side(cores: Cores, encoder: Tensor, shares: Tensor, itemsize: int, padded: bool) -> Menu:
    """k = 0, 1, ... components of all vectors, the most energetic first: k (n + m) numbers.

    ``padded``: a weight without components still takes one of zeros, as PEFT's DoRA wants it.
    """
    parts = [cores.combined(column) for column in encoder.T]
    gain = torch.cat(_energies(parts, shares)).sort(descending=True).values.cumsum(0)
    count = torch.arange(len(gain) + 1, dtype=torch.float64)
    price = itemsize * (len(cores.left) + len(cores.right))
    cost = price * (count.clamp_min(1) if padded else count)
    entries = torch.stack([torch.zeros_like(count), torch.zeros_like(count), count], dim=1)
    return Menu(cost, torch.cat([gain.new_zeros(1), gain]), entries).pareto()


def sharing(cores: Cores, side: str, weights: Tensor, itemsize: int) -> Menu:
    """K components over R shared rows, for many R and every K >= R: n K + R m + (K - R) R numbers."""
    outputs, inputs = len(cores.left), len(cores.right)
    tried = widths(cores.right.shape[1])
    menus = []
    for width, energies in zip(tried, energies_within(cores, shared_axes(cores, weights), tried), strict=True):
        values = (energies * weights[:, None]).flatten().sort(descending=True).values
        gain = values[values > NOISE * values[:1]].cumsum(0)[width - 1 :]
        count = torch.arange(width, width + len(gain), dtype=torch.float64)
        cost = itemsize * (outputs * count + width * inputs + (count - width) * width)
        entries = torch.stack([torch.full_like(count, SIDES.index(side)), torch.full_like(count, width), count], dim=1)
        menus.append(Menu(cost, gain, entries))
    return _together(menus)


def _together(menus: Sequence[Menu]) -> Menu:
    return Menu(*(torch.cat([getattr(menu, field) for menu in menus]) for field in ("cost", "gain", "entries")))


def _energies(parts: Sequence[SVD], shares: Tensor) -> list[Tensor]:
    return [share * part.S.square() for share, part in zip(shares, parts, strict=True)]


def _balanced(cores: Cores, part: SVD) -> LowRank:
    """Both factors of one size, so that neither loses digits (or overflows) in a short dtype."""
    root = part.S.sqrt()
    return LowRank(cores.left @ (part.U * root), (cores.right @ (part.V * root)).T)


def _overlap(cores: Cores) -> dict[str, float]:
    """Mean over the pairs of tasks that both change this weight."""
    sizes = [part.shape[1] for part in cores.ins]
    active = torch.tensor([size > 0 for size in sizes])
    pairs = torch.triu(torch.outer(active, active), diagonal=1)
    if not pairs.any():
        return {}
    mean_rank = sum(sizes) / int(active.sum())
    return {
        "input": float(cores.overlap()[pairs].mean()),
        "output": float(cores.transposed().overlap()[pairs].mean()),
        "input_by_chance": min(1.0, mean_rank / len(cores.right)),
        "output_by_chance": min(1.0, mean_rank / len(cores.left)),
    }


def _mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
    keys = ("input", "output", "input_by_chance", "output_by_chance")
    kept = [entry for entry in found if entry]
    return {key: sum(entry[key] for entry in kept) / max(1, len(kept)) for key in keys}
