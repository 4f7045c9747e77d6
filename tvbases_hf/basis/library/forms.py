"""The ways to keep one weight's changes of one cluster of adapters, and what each costs and loses.

Change t is kept as left @ core_t @ right. ``left`` [n, R] and ``right`` [R', m], directions that most of the cluster's
energy is in, are stored once for the cluster; or one of them, or both, are the identity, and then not stored:

    both    core_t [R, R'], row by row: the first rows, those of the most energetic directions
    left, right, alone    core_t = P Q, by singular components of the change within the shared side, or of all of it

All that is stored are rows of numbers, each in 16, 8 or 4 bits. At a price per byte every row takes the bits of least
(squared error + price * bytes), or is left out: more bits for larger singular values, as in Delta-CoMe
(arXiv 2406.08903). One price for all parts is the best use of the bytes it comes to (Everett, 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ..adapters.budget import Menu
from .bits import BITS, NOISE, row_bytes

# Shares of a side's energy that shared directions may leave out.
TAILS = (0.4, 0.2, 0.1, 0.05, 0.025, 0.01, 3e-3, 1e-4)
# Prices per byte that are tried, in relative squared error of one adapter.
PRICES = tuple(1e-3 * 2.0**-step for step in range(44))
# At most so many directions are shared; up to EXACT of all together they are found exactly.
WIDEST, EXACT = 64, 192
# Of subspace iteration; columns beside those that are wanted. What it misses of a direction, the cores are fitted to.
STEPS, EXTRA = 1, 8
ALONE, RIGHT, LEFT, BOTH = range(4)
Value = TypeVar("Value")


class _computed(Generic[Value]):
    """functools.cached_property without its lock, which lets one thread compute at a time, for all objects of a class
    together (before Python 3.12)."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self.compute = compute

    def __get__(self, instance: Any, owner: Any = None) -> Value:
        value = instance.__dict__[self.compute.__name__] = self.compute(instance)
        return value


@dataclass(frozen=True)
class Form:
    """One way: ``rows`` and ``columns`` are the numbers of shared directions, 0 for the identity."""

    kind: int
    rows: int = 0
    columns: int = 0

    @property
    def rounded(self) -> int:
        """How many roundings a row of the core goes through: of components both factors are stored."""
        return 1 if self.kind == BOTH else 2


@dataclass(frozen=True)
class Part:
    """The changes of one weight in one cluster.

    ``change`` is left [T, n, r] and right [T, r, m], float32; ``weights`` [T] are what a squared error of each counts.
    ``given`` are the directions of both sides, [n, R] and [m, R'], where they are there already; else ``widest`` are
    looked for.
    """

    change: LowRank
    weights: Tensor
    given: tuple[Tensor, Tensor] | None = None
    widest: int = WIDEST

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.left.shape[1], self.change.right.shape[2]

    @_computed
    def inner(self) -> Tensor:
        """[T, r, r] B^T B"""
        return self.change.left.mT @ self.change.left

    @_computed
    def outer(self) -> Tensor:
        """[T, r, r] A A^T"""
        return self.change.right @ self.change.right.mT

    @_computed
    def roots(self) -> tuple[Tensor, Tensor]:
        """[T, r, r] S with S S^T = B^T B, and the same of A A^T."""
        return _root(self.inner), _root(self.outer)

    @_computed
    def squares(self) -> Tensor:
        """[T] squared norms of the changes, float64."""
        return (self.inner.double() * self.outer.double()).sum((1, 2)).clamp_min(0)

    @_computed
    def axes(self) -> tuple[Tensor, Tensor]:
        """[n, W] and [m, W]: orthonormal directions by their share of the weighted energy, largest first."""
        if self.given is not None:
            return self.given
        scale = self.weights.sqrt().to(torch.float32)[:, None, None]
        inner, outer = self.roots
        left, right = (scale * outer).mT @ self.change.left.mT, (scale * inner).mT @ self.change.right
        return _leading(left.flatten(0, 1), self.widest), _leading(right.flatten(0, 1), self.widest)

    @_computed
    def core(self) -> Tensor:
        """[T, W, W] the changes in the coordinates of the axes."""
        left, right = self.axes
        return (left.T @ self.change.left) @ (self.change.right @ right)

    def forms(self) -> list[Form]:
        """What is worth trying: of one adapter nothing can be shared."""
        found = [Form(ALONE)]
        if len(self) < 2 or not bool(self.squares.any()):
            return found
        total = float(self.weights @ self.squares)
        rows, columns = self.along
        pairs = list(dict.fromkeys((_width(rows, total, tail), _width(columns, total, tail)) for tail in TAILS))
        found += [Form(RIGHT, columns=width) for width in dict.fromkeys(pair[1] for pair in pairs[1::2])]
        found += [Form(LEFT, rows=width) for width in dict.fromkeys(pair[0] for pair in pairs[1::2])]
        return found + [Form(BOTH, *pair) for pair in pairs]

    def energies(self, form: Form) -> Tensor:
        """[T, K] weighted squared norms of the rows or components that a form can keep, float64; K <= R or r."""
        if form.kind == BOTH:
            part = self.core[:, : form.rows, : form.columns]
            return self.weights[:, None] * part.double().square().sum(2)
        middle, root = self.outer, self.roots[0]
        if form.kind == RIGHT:
            inside = self.change.right @ self.axes[1][:, : form.columns]
            middle = inside @ inside.mT
        elif form.kind == LEFT:
            inside = self.axes[0][:, : form.rows].T @ self.change.left
            middle, root = inside.mT @ inside, self.roots[1]
        values = torch.linalg.eigvalsh((root.mT @ middle @ root).double()).flip(1).clamp_min(0)
        return self.weights[:, None] * values

    @_computed
    def along(self) -> tuple[Tensor, Tensor]:
        """[W] and [W] weighted energies along the axes of both sides."""
        left, right = self.axes
        rows = _projected(left, self.change.left, self.outer)
        return self.weights @ rows, self.weights @ _projected(right, self.change.right.mT, self.inner)

    def sides(self, form: Form) -> tuple[Tensor, Tensor]:
        """[R] and [R'] weighted energies of the directions that a form shares."""
        if not (form.rows or form.columns):
            return torch.zeros(0).double(), torch.zeros(0).double()
        rows, columns = self.along
        return rows[: form.rows], columns[: form.columns]

    def row_cost(self, form: Form) -> list[int]:
        """[len(BITS)] bytes of one row of the core, or of one component."""
        outputs, inputs = form.rows or self.shape[0], form.columns or self.shape[1]
        sizes = (inputs,) if form.kind == BOTH else (outputs, inputs)
        return [sum(row_bytes(size, bits) for size in sizes) for bits in BITS]

    def menu(self, allowed: Sequence[int]) -> tuple[Menu, list[Form]]:
        """All forms at all prices: ``entries`` are the place of the form and that of the price; (-1, 0) is nothing.

        ``allowed`` are the bits that may be used.
        """
        total, forms = float(self.weights @ self.squares), self.forms()
        sides = [None, None]
        if len(forms) > 1:
            sides = [_shared(side.numpy(), size, allowed) for side, size in zip(self.along, self.shape, strict=True)]
        costs, gains, entries = [np.zeros(1)], [np.zeros(1)], [np.array([[-1.0, 0.0]])]
        for place, form in enumerate(forms):
            energy = self.energies(form)
            spent = _spent(_ordered(energy, form).numpy(), energy.numpy(), self.row_cost(form), allowed, form.rounded)
            gain, cost = float(energy.sum()) - spent[0], spent[1]
            for side, width in zip(sides, (form.rows, form.columns), strict=True):
                if side is not None and width:
                    gain, cost = gain - side[0][:, width - 1], cost + side[1][:, width - 1]
            costs.append(cost)
            gains.append(np.minimum(gain, total))
            entries.append(np.stack([np.full(len(PRICES), float(place)), np.arange(len(PRICES), dtype=float)], axis=1))
        menu = Menu(*(torch.from_numpy(np.concatenate(part)) for part in (costs, gains, entries)))
        return menu.pareto(), forms


def counts_of(part: Part, form: Form, price: float, allowed: Sequence[int]) -> Tensor:
    """[T, len(BITS)] how many rows of each adapter are kept in which bits, those with more bits first."""
    options = _options(part.row_cost(form), allowed, form.rounded)
    return _counts(_ordered(part.energies(form), form), options, price)


def shared_counts(part: Part, form: Form, price: float, allowed: Sequence[int]) -> list[list[int]]:
    """The same for the shared directions of both sides, all of which are kept."""
    sides = zip(part.sides(form), part.shape, strict=True)
    return [_counts(side[None], _kept_options(size, allowed), price)[0].tolist() for side, size in sides]


@dataclass(frozen=True)
class _Options:
    """What a row may be kept in, ``places`` in BITS in the order of its energy (-1 for not at all), what of its energy
    each loses, what each costs, and the energies ``at`` which one follows the other at a price of 1: there
    noise * energy + cost is the same for both."""

    places: list[int]
    noise: np.ndarray
    cost: np.ndarray
    at: np.ndarray


def _options(cost: Sequence[int], allowed: Sequence[int], rounded: int, keep: bool = False) -> _Options:
    places = [] if keep else [-1]
    places += [place for place in reversed(range(len(BITS))) if BITS[place] in allowed]
    noise = np.array([1.0 if place < 0 else rounded * NOISE[BITS[place]] for place in places])
    prices = np.array([0.0 if place < 0 else float(cost[place]) for place in places])
    return _Options(places, noise, prices, np.diff(prices) / -np.diff(noise))


def _kept_options(size: int, allowed: Sequence[int]) -> _Options:
    return _options([row_bytes(size, bits) for bits in BITS], allowed, 1, keep=True)


def _counts(energy: Tensor, options: _Options, price: float) -> Tensor:
    chosen = torch.tensor(options.places)[torch.from_numpy(np.searchsorted(price * options.at, energy.numpy()))]
    return torch.stack([(chosen == place).sum(1) for place in range(len(BITS))], dim=1)


def _spent(
    ordered: np.ndarray, energy: np.ndarray, cost: Sequence[int], allowed: Sequence[int], rounded: int
) -> tuple[np.ndarray, np.ndarray]:
    """[len(PRICES)] squared error and bytes of rows at every price; ``ordered`` is by what a row's bits are chosen."""
    options, values = _options(cost, allowed, rounded), ordered.ravel()
    order = np.argsort(values, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(energy.ravel()[order])])
    edges = np.zeros((len(PRICES), len(options.places) + 1), dtype=np.int64)
    edges[:, 1:-1] = np.searchsorted(values[order], np.array(PRICES)[:, None] * options.at)
    edges[:, -1] = len(values)
    return np.diff(before[edges], axis=1) @ options.noise, np.diff(edges, axis=1) @ options.cost


def _shared(side: np.ndarray, size: int, allowed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """[len(PRICES), W] squared error and bytes of the leading 1 to W shared directions at every price."""
    options = _kept_options(size, allowed)
    chosen = np.stack([np.searchsorted(price * options.at, side) for price in PRICES])
    return np.cumsum(options.noise[chosen] * side, axis=1), np.cumsum(options.cost[chosen], axis=1)


def _ordered(energy: Tensor, form: Form) -> Tensor:
    """Descending, so that bits are: a row of a core counts as much as the largest after it."""
    return energy.flip(1).cummax(1).values.flip(1) if form.kind == BOTH else energy


def _width(energies: Tensor, total: float, tail: float) -> int:
    """The fewest leading directions that leave out ``tail`` of the energy; all of them where none do."""
    left = total - energies.cumsum(0)
    return min(len(energies), 1 + int((left > tail * total).sum()))


def _projected(axes: Tensor, factor: Tensor, middle: Tensor) -> Tensor:
    """[T, W] squared norms of the changes along each axis, float64: the diagonal of (axes^T F) M (axes^T F)^T."""
    inside = axes.T @ factor
    return ((inside @ middle) * inside).sum(2).double().clamp_min(0)


def _root(square: Tensor) -> Tensor:
    """[T, r, r] S with S S^T = ``square``, symmetric positive semidefinite."""
    values, vectors = torch.linalg.eigh(square)
    return vectors * values.clamp_min(0).sqrt()[:, None, :]


def _leading(rows: Tensor, widest: int) -> Tensor:
    """[d, W] orthonormal: the leading right singular vectors of [N, d]; of large ones by subspace iteration.

    The iterate is started from a fixed random one: the same numbers give the same axes.
    """
    count, side = rows.shape
    if count <= EXACT or side <= EXACT:
        small = rows @ rows.T if count < side else rows.T @ rows
        vectors = torch.linalg.eigh(small).eigenvectors.flip(1)[:, :widest]
        return torch.linalg.qr(rows.T @ vectors).Q if count < side else vectors
    generator = torch.Generator().manual_seed(0)
    block = rows.T @ torch.randn(count, widest + EXTRA, generator=generator)
    for _ in range(STEPS):
        block = rows.T @ (rows @ torch.linalg.qr(block).Q)
    basis = torch.linalg.qr(block).Q
    inside = rows @ basis
    return basis @ torch.linalg.eigh(inside.T @ inside).eigenvectors.flip(1)[:, :widest]
