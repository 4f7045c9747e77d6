"""Spending a byte budget: against every combination, on menus small enough to try them all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from oracles.matrices import gaussian
from tvbases_hf.basis.adapters.budget import Menu, spend
from tvbases_hf.errors import ParameterError


def menu(cost: Sequence[float], gain: Sequence[float]) -> Menu:
    numbers = torch.arange(len(cost), dtype=torch.float64)[:, None]
    return Menu(torch.tensor(cost, dtype=torch.float64), torch.tensor(gain, dtype=torch.float64), numbers)


def concave(seed: int, count: int = 5, price: int = 1) -> Menu:
    steps = gaussian(seed, count).abs().sort(descending=True).values
    gain = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    return menu([price * k for k in range(count + 1)], gain.tolist())


def ragged(seed: int, count: int = 7) -> Menu:
    cost = (10 * gaussian(seed, count).abs()).round() + 1
    return menu([0.0, *cost.tolist()], [0.0, *gaussian(seed + 1, count).abs().tolist()]).pareto()


def total(menus: Sequence[Menu], chosen: Sequence[int], what: str) -> float:
    return sum(float(getattr(menu, what)[index]) for menu, index in zip(menus, chosen, strict=True))


def best(menus: Sequence[Menu], budget: float) -> float:
    """The greatest gain of any combination within the budget."""
    combinations = itertools.product(*(range(len(menu.cost)) for menu in menus))
    return max(total(menus, c, "gain") for c in combinations if total(menus, c, "cost") <= budget)


@pytest.mark.parametrize("budget", range(0, 17))
def test_concave_menus_of_one_price_are_spent_optimally_at_every_budget(budget: int) -> None:
    menus = [concave(seed) for seed in range(3)]
    chosen = spend(menus, budget)
    assert total(menus, chosen, "cost") <= budget
    assert total(menus, chosen, "gain") == pytest.approx(best(menus, budget), rel=1e-12)


@pytest.mark.parametrize("budget", [3, 7, 12, 20, 33, 60])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_what_is_chosen_loses_less_than_one_segment_of_a_hull_to_the_optimum(seed: int, budget: float) -> None:
    """A price per byte is optimal for the bytes it spends; what is left over is worth less than the next segment."""
    menus = [ragged(seed + part) for part in range(4)]
    chosen = spend(menus, budget)
    assert total(menus, chosen, "cost") <= budget
    segment = max(float(menu.gain[-1]) for menu in menus)
    optimum = best(menus, budget)
    assert optimum - segment <= total(menus, chosen, "gain") <= optimum + 1e-12


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_no_single_upgrade_is_left_that_the_budget_still_holds(seed: int) -> None:
    menus, budget = [ragged(seed + part) for part in range(4)], 25.0
    chosen = spend(menus, budget)
    left = budget - total(menus, chosen, "cost")
    for each, index in zip(menus, chosen, strict=True):
        better = (each.gain > each.gain[index]) & (each.cost <= each.cost[index] + left)
        assert not better.any()


def test_a_budget_for_everything_takes_the_best_entry_of_every_menu() -> None:
    menus = [ragged(seed) for seed in range(5)]
    assert spend(menus, 1e9) == [len(each.cost) - 1 for each in menus]


def test_entries_that_a_cheaper_one_equals_or_beats_are_left_out() -> None:
    found = menu([4, 0, 2, 2, 3, 6], [5, 0, 3, 1, 3, 5]).pareto()
    assert found.cost.tolist() == [0, 2, 4]
    assert found.gain.tolist() == [0, 3, 5]
    assert found.entries[:, 0].tolist() == [1, 2, 0]


def test_a_jump_that_does_not_fit_does_not_keep_the_rest_of_the_budget_from_the_others() -> None:
    jump = menu([0, 100], [0, 1000])
    chosen = spend([jump, concave(1)], 5)
    assert chosen == [0, 5]


def test_entries_off_the_hull_fill_what_is_left() -> None:
    dented = menu([0, 6, 10], [0, 5.9, 10])  # the middle lies below the line between the ends
    assert spend([dented], 9) == [1]
    assert spend([dented], 10) == [2]


def test_more_budget_never_loses_on_concave_menus() -> None:
    menus = [concave(seed, price=1 + seed) for seed in range(3)]
    gains: list[float] = [total(menus, spend(menus, budget), "gain") for budget in range(0, 31, 6)]
    assert gains == sorted(gains)


def test_less_than_the_cheapest_entries_need_is_refused_with_the_number() -> None:
    needy: Tensor = torch.tensor([7.0, 9.0], dtype=torch.float64)
    with pytest.raises(ParameterError, match=r"10 bytes are not enough .*\(14 bytes\)"):
        spend([Menu(needy, needy, needy[:, None])] * 2, 10)
