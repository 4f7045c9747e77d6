"""A byte budget spent over many parts, each with its own menu of encodings: rate-distortion allocation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ParameterError


@dataclass(frozen=True)
class Menu:
    """The ways to encode one part: ``cost`` [N] bytes, ``gain`` [N] squared error that they save, both float64.

    ``entries`` [N, k] says what each way is, in the caller's own numbers.
    """

    cost: Tensor
    gain: Tensor
    entries: Tensor

    def pareto(self) -> Menu:
        """Without the entries that a cheaper one equals or beats; sorted by cost, and so by gain."""
        index = self.gain.argsort(descending=True, stable=True)
        index = index[self.cost[index].argsort(stable=True)]
        gain = self.gain[index]
        best = gain.cummax(0).values
        keep = index[torch.cat([best.new_ones(1, dtype=torch.bool), gain[1:] > best[:-1]])]
        return Menu(self.cost[keep], self.gain[keep], self.entries[keep])


def spend(menus: Sequence[Menu], budget: float) -> list[int]:
    """One entry of every (Pareto) menu, of the greatest total gain that a price per byte finds within ``budget``.

    At a price lambda each part by itself takes the entry of greatest gain - lambda * cost, a corner of its menu's
    upper concave hull; the choice is optimal for the bytes it uses (Everett, 1963). Lowering lambda from infinity
    walks through the hulls' segments in the order of their slopes, which is what is done here. Where the next segment
    does not fit any more, the rest goes to the upgrades that do, most gain per byte first.

    Raises ParameterError when the cheapest entries of all exceed the budget.
    """
    hulls = [_hull(menu) for menu in menus]
    chosen = [hull[0][0] for hull in hulls]
    left = budget - sum(float(menu.cost[index]) for menu, index in zip(menus, chosen, strict=True))
    if left < 0:
        raise ParameterError(f"{budget:.0f} bytes are not enough for what has to be kept ({budget - left:.0f} bytes)")
    steps = sorted(
        (-_slope(low, high), part, low[0], high[0])
        for part, hull in enumerate(hulls)
        for low, high in itertools.pairwise(hull)
    )
    for _, part, low, high in steps:
        price = float(menus[part].cost[high] - menus[part].cost[low])
        if chosen[part] == low and price <= left:
            chosen[part] = high
            left -= price
    return _fill(menus, chosen, left)


def _fill(menus: Sequence[Menu], chosen: list[int], left: float) -> list[int]:
    """Upgrades within ``left`` bytes, of most gain per byte each time; entries off the hulls count too."""
    offers = [_offer(menu, index, left) for menu, index in zip(menus, chosen, strict=True)]
    while offers:
        part = max(range(len(offers)), key=lambda p: offers[p][0])
        slope, index = offers[part]
        if slope <= 0:
            break
        price = float(menus[part].cost[index] - menus[part].cost[chosen[part]])
        if price <= left:
            chosen[part] = index
            left -= price
        offers[part] = _offer(menus[part], chosen[part], left)
    return chosen


def _offer(menu: Menu, current: int, left: float) -> tuple[float, int]:
    """The best gain per byte of an upgrade for at most ``left`` bytes, and its entry; (0, current) without one."""
    price, gain = menu.cost - menu.cost[current], menu.gain - menu.gain[current]
    possible = (price > 0) & (price <= left) & (gain > 0)
    if not possible.any():
        return 0.0, current
    slope = torch.where(possible, gain / price.clamp_min(1e-300), torch.zeros_like(gain))
    best = int(slope.argmax())
    return float(slope[best]), best


Corner = tuple[int, float, float]


def _hull(menu: Menu) -> list[Corner]:
    """Corners (entry, cost, gain) of the upper concave hull of a menu sorted by cost and gain."""
    corners: list[Corner] = []
    for corner in zip(range(len(menu.cost)), menu.cost.tolist(), menu.gain.tolist(), strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) < _slope(corners[-1], corner):
            corners.pop()
        corners.append(corner)
    return corners


def _slope(low: Corner, high: Corner) -> float:
    return (high[2] - low[2]) / (high[1] - low[1])
