"""Ways to forget, compared at matched forgetting."""

from __future__ import annotations

import pytest
import torch
from matched import Rises, compare, interval


def line(slope: float, harm: float, windows: int = 8, noise: float = 0.0, alphas: int = 4) -> Rises:
    """A loss that rises by ``slope`` per alpha on the unwanted task, and by ``harm`` on the one other."""
    grid = tuple(float(a) for a in range(alphas))
    chance = torch.Generator().manual_seed(0)
    rises = torch.tensor(grid)[:, None, None] * torch.tensor([slope, harm])[:, None].expand(2, windows)
    return Rises(grid, rises + noise * torch.randn(1, 1, windows, generator=chance) * torch.tensor(grid)[:, None, None])


def test_alpha_and_harm_are_those_of_the_line() -> None:
    rises = line(0.2, 0.05)
    assert rises.alpha_at(0.3) == pytest.approx(1.5)
    assert rises.harm_at(0.3) == pytest.approx(0.075)
    assert rises.alpha_at(0.7) is None and rises.harm_at(0.7) is None


def test_a_direction_of_another_length_is_no_better_at_matched_forgetting() -> None:
    """At equal alpha the shorter one harms half as much; matched, there is no difference at all."""
    long, short = line(0.2, 0.1), line(0.1, 0.05, alphas=8)
    assert float(short.rises[1, 1].mean()) == pytest.approx(float(long.rises[1, 1].mean()) / 2)
    rows = compare([{"plain": long, "unique": short}], [0.3], reference="plain")
    assert rows[1]["difference"] == pytest.approx(0, abs=1e-7)


def test_a_direction_that_harms_less_is_told_from_noise() -> None:
    runs = [{"plain": line(0.2, 0.1, 32, 0.02), "unique": line(0.2, 0.05, 32, 0.02)} for _ in range(3)]
    _, row = compare(runs, [0.3], reference="plain")
    low, high = row["difference_interval"]
    assert low < row["difference"] < high < 0 and row["difference"] == pytest.approx(-0.075, rel=0.1)


def test_a_level_that_is_never_reached_has_no_row() -> None:
    rows = compare([{"plain": line(0.2, 0.1), "unique": line(0.01, 0.0)}], [0.3], reference="plain")
    assert [row["name"] for row in rows] == ["plain"]


def test_an_interval_holds_the_middle_of_its_values() -> None:
    assert interval([float(i) for i in range(101)]) == pytest.approx((2.5, 97.5))
