"""Which adapters share directions, how many, and in how many bits: chosen by what the bytes bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...errors import ParameterError
from ...options import options_of
from ...storage.parallel import each
from ..adapters.budget import Menu, spend
from .bits import BITS
from .factors import Opened
from .forms import ALONE, PRICES, Form, Part
from .sketch import Sketches, cut, linkage, sketch

Bits = Literal["auto", "16", "8", "4"]
# No cluster has more members, so that one weight of one of them fits into memory.
MOST_MEMBERS = 512
# Weights by which numbers of clusters are compared.
COMPARED_WEIGHTS = 4
# What counts takes per weight, in the file of a task or of a cluster.
COUNTS_BYTES = 12
# Of the bytes, at most this share goes to the merged adapter that PEFT loads.
STOCK_SHARE = 0.1


@dataclass(frozen=True)
class Plan:
    """``clusters`` [C] lists of adapters; ``choices`` by (cluster, weight) the form and the price; the rank of the
    stock adapter; ``curve`` as in LibraryInfo; ``similarity_error`` the standard error of the sketches."""

    opened: Opened
    sketches: Sketches
    weights: Tensor
    allowed: tuple[int, ...]
    normalize: bool
    clusters: list[list[int]]
    choices: dict[tuple[int, str], tuple[Form, float]]
    price: float
    stock_rank: int
    curve: list[list[float]]
    similarity_error: float

    def part(self, cluster: int, name: str) -> Part:
        """The changes of one weight in one cluster, with no more directions than were chosen."""
        members = self.clusters[cluster]
        form, _ = self.choices.get((cluster, name), (Form(ALONE), 0.0))
        widest = max(form.rows, form.columns, 1)
        return Part(self.opened.changes(name, members), self.weights[members], widest=widest)


def make_plan(
    opened: Opened,
    budget: float,
    *,
    normalize: Annotated[bool, Field(description="count each task's error relative to its own norm")] = True,
    bits: Annotated[Bits, Field(description="bits per number; auto: more for larger singular values")] = "auto",
    clusters: Annotated[
        int | None,
        Field(ge=1, description="number of groups of adapters that share directions; none: what loses least"),
    ] = None,
) -> Plan:
    """Describe all adapters, group them, and choose what to keep within ``budget``, a share of their bytes.

    Raises ParameterError for a budget that does not hold what every library takes.
    """
    found = sketch(opened)
    if not found.square_norms.any():
        raise ParameterError(
            f'nothing to compress: all {len(opened.tasks)} adapters (first: "{opened.tasks[0]}") are 0'
        )
    norms = found.square_norms
    relative = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(norms))
    weights = relative if normalize else torch.full_like(norms, float(1 / norms.max()))
    allowed = BITS if bits == "auto" else (int(bits),)
    similarity, error = found.similarity()
    joins = linkage(similarity)
    available, rank = _available(opened, budget)
    groups = _grouped(opened, weights, allowed, joins, available, clusters)
    menus = _menus(opened, weights, allowed, groups, opened.names)
    picked = spend([menu for menu, _ in menus.values()], available)
    choices = {}
    for (key, (menu, forms)), index in zip(menus.items(), picked, strict=True):
        place, step = (int(number) for number in menu.entries[index])
        if place >= 0:
            choices[key] = forms[place], PRICES[step]
    if not choices:
        raise ParameterError(f"{available:.0f} bytes hold no row of any weight; give a larger budget")
    curve = _curve(
        [menu for menu, _ in menus.values()], float(weights @ norms), len(norms), budget * opened.nbytes - available
    )
    return Plan(
        opened, found, weights, allowed, normalize, groups, choices, _middle(choices), rank, curve, error
    )  # fmt: skip


# What a library can be asked beside the budget.
LIBRARY_OPTIONS = options_of(make_plan)


def _available(opened: Opened, budget: float) -> tuple[float, int]:
    """Bytes for rows, and the rank of the stock adapter: what remains of the budget after what every library takes."""
    total, count = budget * opened.nbytes, len(opened.tasks)
    # At most half as many clusters as tasks share something.
    fixed = (count + count // 2) * COUNTS_BYTES * len(opened.names)
    per_rank = opened.dtype.itemsize * sum(sum(opened.shape(name)) for name in opened.names)
    rank = max(1, min(opened.rank, int(STOCK_SHARE * total / per_rank)))
    left = total - fixed - rank * per_rank
    if left <= 0:
        raise ParameterError(
            f"budget {budget:g} is {total:.0f} bytes, less than what a library of {count} tasks takes before any of "
            f"their numbers ({fixed + rank * per_rank:.0f} bytes, of the merged adapter mostly); give a larger one"
        )
    return left, rank


def _grouped(
    opened: Opened,
    weights: Tensor,
    allowed: Sequence[int],
    joins: Sequence[tuple[int, int]],
    available: float,
    wanted: int | None,
) -> list[list[int]]:
    """The groups that lose least in some of the weights, of as many as ``wanted`` where that is said."""
    count = len(opened.tasks)
    if wanted is not None and wanted > count:
        raise ParameterError(f"clusters {wanted} are more than the {count} adapters")
    if wanted is not None:
        return cut(joins, count, wanted, MOST_MEMBERS)
    sample = opened.names[len(opened.names) // (2 * COMPARED_WEIGHTS) :: max(1, len(opened.names) // COMPARED_WEIGHTS)]
    share = sum(sum(opened.shape(name)) for name in sample) / sum(sum(opened.shape(name)) for name in opened.names)
    lost: dict[int, float] = {}

    def loss(number: int) -> float:
        """What this many groups lose in the sample, less what nothing would save."""
        if number not in lost:
            groups = cut(joins, count, number, MOST_MEMBERS)
            menus = [menu for menu, _ in _menus(opened, weights, allowed, groups, sample).values()]
            picked = spend(menus, available * share)
            lost[number] = -sum(float(menu.gain[index]) for menu, index in zip(menus, picked, strict=True))
        return lost[number]

    return cut(joins, count, least(loss, count), MOST_MEMBERS)


def least(loss: Callable[[int], float], count: int) -> int:
    """The number of groups, from 1 to ``count``, at which about the least is lost: by steps of 4, then by smaller ones.

    Ever more groups are ever more work, and share less, so the first step that does not help is the last. But a few
    groups of many families each may be no better than one, and say nothing of more: after one group, it is the second.
    """
    best, worse = 1, 0
    for number in sorted({min(count, 4**step) for step in range(1, count.bit_length() // 2 + 2)} - {1}):
        if loss(number) < loss(best):
            best, worse = number, 0
            continue
        worse += 1
        if worse > (best == 1):
            break
    for step in (2.0, 2**0.5, 2**0.25):
        near = {max(1, min(count, round(best * factor))) for factor in (1 / step, 1, step)}
        best = min(sorted(near), key=loss)
    return best


def _menus(
    opened: Opened, weights: Tensor, allowed: Sequence[int], groups: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[tuple[int, str], tuple[Menu, list[Form]]]:
    """By cluster and weight, in the order of the weights; what a cluster's file takes is not counted."""
    keys = [(cluster, name) for name in names for cluster in range(len(groups))]

    def menu(key: tuple[int, str]) -> tuple[Menu, list[Form]]:
        members = list(groups[key[0]])
        return Part(opened.changes(key[1], members), weights[members]).menu(allowed)

    size = lambda key: len(groups[key[0]]) * sum(opened.shape(key[1])) * opened.rank  # noqa: E731
    return dict(each(keys, menu, "Choosing directions", size))


def _curve(menus: Sequence[Menu], total: float, count: int, fixed: float) -> list[list[float]]:
    """[bytes, root mean square error] of the best choice at every fourth price."""
    found = []
    for price in PRICES[::2]:
        best = [int((menu.gain - price * menu.cost).argmax()) for menu in menus]
        cost = fixed + sum(float(menu.cost[index]) for menu, index in zip(menus, best, strict=True))
        saved = sum(float(menu.gain[index]) for menu, index in zip(menus, best, strict=True))
        found.append([cost, (max(0.0, total - saved) / count) ** 0.5])
    return [row for place, row in enumerate(found) if not place or row != found[place - 1]]


def _middle(choices: Mapping[tuple[int, str], tuple[Form, float]]) -> float:
    """The usual price: what adapters that come later pay."""
    prices = sorted(price for _, price in choices.values())
    return prices[len(prices) // 2]
