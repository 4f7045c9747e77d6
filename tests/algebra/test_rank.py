"""Rank rules against their definitions, and the Gavish-Donoho threshold against the published one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from oracles.matrices import gaussian, with_spectrum
from tvbases_hf.algebra.rank import RankRule, _gavish_donoho
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.tsv import default_rank

SQUARE = 2.858  # Gavish and Donoho (2014), abstract: the coefficient of the median singular value for a square matrix
FIT_ERROR = 0.02  # of their cubic in the aspect ratio
spectra = st.lists(st.floats(0.01, 100), min_size=1, max_size=20).map(lambda v: torch.tensor(sorted(v, reverse=True)))


def omega(beta: float) -> float:
    """Optimal threshold for known noise over the root of the Marchenko-Pastur distribution's median."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def below(t: float) -> float:
        """Probability up to t; x = low + (high - low) sin^2 takes the square roots out of the integrand."""
        end = math.asin(math.sqrt((t - low) / (high - low)))
        spread = high - low

        def density(angle: float) -> float:
            x = low + spread * math.sin(angle) ** 2
            return spread**2 * 2 * (math.sin(angle) * math.cos(angle)) ** 2 / (2 * math.pi * beta * max(x, 1e-300))

        return quad(density, 0, end)[0]

    median = float(brentq(lambda t: below(t) - 0.5, low, high))  # pyright: ignore[reportArgumentType]
    known_noise = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known_noise / math.sqrt(median)


def test_gavish_donoho_threshold_of_a_square_matrix_is_the_published_one() -> None:
    assert omega(1.0) == pytest.approx(SQUARE, abs=1e-3)
    assert _gavish_donoho(70, 70) == pytest.approx(SQUARE, abs=FIT_ERROR)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_gavish_donoho_threshold_follows_the_aspect_ratio(beta: float) -> None:
    assert _gavish_donoho(round(1000 * beta), 1000) == pytest.approx(omega(beta), abs=FIT_ERROR)
    assert _gavish_donoho(1000, round(1000 * beta)) == _gavish_donoho(round(1000 * beta), 1000)


@pytest.mark.parametrize("shape", [(60, 60), (40, 120), (120, 40)])
def test_gavish_donoho_finds_the_planted_rank_under_noise(shape: tuple[int, int]) -> None:
    """A singular value is found from (1 + sqrt(2)) sigma sqrt(n) or so; planted at 4."""
    noise = 0.01
    planted = with_spectrum(0, *shape, torch.full((5,), 4 * noise * math.sqrt(max(shape))))
    values = torch.linalg.svdvals(planted + noise * gaussian(1, *shape))
    assert RankRule.parse("gavish-donoho").of_spectrum(values, *shape) == 5
    assert RankRule.parse("energy:0.999").of_spectrum(values, *shape) > 20  # a share of energy cannot tell


@pytest.mark.parametrize("kind", ["gavish-donoho", "energy:0.9", "energy:1", "7", "fraction:0.5"])
def test_zero_singular_values_may_be_left_out(kind: str) -> None:
    rule, values = RankRule.parse(kind), torch.tensor([9.0, 3, 3, 2, 1])
    padded = torch.cat([values, torch.zeros(25)])
    assert rule.of_spectrum(values, 30, 40) == rule.of_spectrum(padded, 30, 40)


@settings(deadline=None)
@given(values=spectra, share=st.floats(0.001, 1))
def test_energy_keeps_the_fewest_with_that_share(values: torch.Tensor, share: float) -> None:
    rank = RankRule("energy", share).of_spectrum(values, 20, 30)
    squares = values.double().square()
    assert squares[:rank].sum() >= (share - 1e-9) * squares.sum()
    assert rank == 1 or squares[: rank - 1].sum() < (share + 1e-9) * squares.sum()


@settings(deadline=None)
@given(values=spectra, count=st.integers(1, 40))
def test_absolute_is_that_many_within_the_shape(values: torch.Tensor, count: int) -> None:
    rule = RankRule.parse(count)
    assert rule.of_shape(20, 30) == rule.of_shape(30, 20) == min(count, 20)
    assert rule.of_spectrum(values, 20, 30) == min(count, len(values))


@settings(deadline=None)
@given(numerator=st.integers(1, 1000), denominator=st.integers(1, 1000), rows=st.integers(1, 500))
def test_fraction_is_rounded_down_but_never_to_zero(numerator: int, denominator: int, rows: int) -> None:
    numerator = min(numerator, denominator)
    rule = RankRule("fraction", numerator / denominator)
    assert rule.of_shape(rows, rows + 3) == max(1, numerator * rows // denominator)


def test_each_of_t_tasks_gets_the_whole_part_of_its_share() -> None:
    """98 components for 49 tasks are 2 each, although the float nearest to 1/49 times 98 is below 2."""
    assert int(1 / 49 * 98) == 1
    assert all(default_rank(t).of_shape(n, n) == max(1, n // t) for t in range(1, 130) for n in range(1, 600))


@pytest.mark.parametrize("kind", ["gavish-donoho", "energy:0.5", "energy:1", "3", "fraction:1"])
def test_a_zero_matrix_has_rank_zero_and_noise_does_not_count(kind: str) -> None:
    rule = RankRule.parse(kind)
    assert rule.of_spectrum(torch.zeros(10), 10, 10) == 0
    assert rule.of_spectrum(torch.zeros(0), 10, 10) == 0
    assert 1 <= rule.of_spectrum(torch.tensor([1.0, 0.5, 1e-8, 1e-9]), 10, 10) <= 2


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (16, RankRule("absolute", 16)),
        (16.0, RankRule("absolute", 16)),
        ("16", RankRule("absolute", 16)),
        (0.25, RankRule("fraction", 0.25)),
        ("0.25", RankRule("fraction", 0.25)),
        ("fraction:1", RankRule("fraction", 1)),
        (" Energy : 0.95", RankRule("energy", 0.95)),
        ("gavish-donoho", RankRule("gavish-donoho")),
        (RankRule("energy", 0.5), RankRule("energy", 0.5)),
    ],
)
def test_a_rule_reads_as_written_and_writes_as_read(text: str | float | RankRule, rule: RankRule) -> None:
    assert RankRule.parse(text) == rule
    assert RankRule.parse(str(rule)) == rule


NO_RULES = """
foo nan energy energy: energy:0 energy:2 energy:nan fraction:1.5 fraction:0 gavish-donoho:0.5 16:2 rank:3 1e400
"""


@pytest.mark.parametrize("text", [0, -1, 1.5, -0.5, float("nan"), float("inf"), True, "", *NO_RULES.split()])
def test_what_is_not_a_rule_is_refused_with_one_clear_message(text: str | float) -> None:
    with pytest.raises(ParameterError) as refused:
        RankRule.parse(text)
    message = str(refused.value)
    assert message.count("\n") == 0 and repr(text) in message
    assert all(example in message for example in ("16", "fraction:0.25", "energy:0.95", "gavish-donoho"))


def test_only_energy_and_gavish_donoho_look_at_the_spectrum() -> None:
    kinds = {text: RankRule.parse(text).needs_spectrum for text in ("3", "0.5", "energy:0.5", "gavish-donoho")}
    assert kinds == {"3": False, "0.5": False, "energy:0.5": True, "gavish-donoho": True}
