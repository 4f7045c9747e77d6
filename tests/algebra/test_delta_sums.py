"""Scaled, added and mixed changes against dense float64 arithmetic: the same numbers, in the smallest form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from oracles.matrices import EPS, Largest, gaussian
from tvbases_hf.algebra.delta import Delta, Dense, Dora, LowRank, dense
from tvbases_hf.algebra.products import square_norm
from tvbases_hf.algebra.sums import mix, scale, total

ROWS, COLUMNS = 24, 17
BASE = gaussian(0, ROWS, COLUMNS).float()


def low_rank(seed: int, rank: int = 3) -> LowRank:
    return LowRank(gaussian(seed, ROWS, rank).float(), gaussian(seed + 100, rank, COLUMNS).float())


def dora(seed: int, rank: int = 3, base: Tensor = BASE) -> Dora:
    return Dora(0.1 * gaussian(seed + 200, ROWS).float(), base, low_rank(seed, rank))


def full(seed: int) -> Dense:
    return Dense(BASE + gaussian(seed + 300, ROWS, COLUMNS).float(), BASE)


FORMS = {"dense": full, "low-rank": low_rank, "dora": dora}
WEIGHTS = [0.7, -1.3, 0.0, 2.0]


def expected(deltas: list[Delta], weights: list[float]) -> Tensor:
    return torch.stack([w * dense(d) for d, w in zip(deltas, weights, strict=True)]).sum(dim=0)


def bound(deltas: list[Delta], weights: list[float]) -> Tensor:
    """One float32 rounding of every factor, row scale and sum, in each of the terms."""
    lows = [d.low if isinstance(d, Dora) else d for d in deltas]
    ranks = [low.rank if isinstance(low, LowRank) else 0 for low in lows]
    sizes = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        low = delta.low if isinstance(delta, Dora) else delta
        sizes += abs(weight) * (low.left.double().abs() @ low.right.double().abs() if isinstance(low, LowRank) else 0)
        sizes += abs(weight) * dense(delta).abs()
        if isinstance(delta, Dora):
            sizes += abs(weight) * (delta.row_scale[:, None] * delta.base).double().abs()
    return (max(ranks) + 3) * EPS * sizes


@pytest.mark.parametrize("forms", list(itertools.product(FORMS, repeat=3)))
def test_a_sum_is_the_dense_sum_whatever_the_forms(forms: tuple[str, ...]) -> None:
    deltas: list[Delta] = [FORMS[form](seed) for seed, form in enumerate(forms)]
    for weights in itertools.permutations(WEIGHTS, 3):
        found = dense(total(deltas, weights))
        assert ((found - expected(deltas, list(weights))).abs() <= bound(deltas, list(weights))).all()


def test_weights_are_ones_when_not_given() -> None:
    deltas: list[Delta] = [low_rank(1), full(2), dora(3)]
    assert torch.equal(dense(total(deltas)), dense(total(deltas, [1.0, 1.0, 1.0])))


def test_ranks_add_up_and_unequal_ranks_mix() -> None:
    found = total([low_rank(1, 2), low_rank(2, 5), low_rank(3, 0)], [1.0, -1.0, 3.0])
    assert isinstance(found, LowRank) and found.rank == 7


def test_a_change_of_weight_zero_costs_no_rank() -> None:
    found = total([low_rank(1, 2), low_rank(2, 5)], [0.0, 1.0])
    assert isinstance(found, LowRank) and found.rank == 5
    nothing = total([low_rank(1), low_rank(2)], [0.0, 0.0])
    assert isinstance(nothing, LowRank) and nothing.rank == 0 and nothing.shape == (ROWS, COLUMNS)


def test_changes_with_one_right_factor_keep_its_rank() -> None:
    right = gaussian(5, 4, COLUMNS).float()
    deltas: list[Delta] = [LowRank(gaussian(seed, ROWS, 4).float(), right) for seed in range(3)]
    found = total(deltas, [1.0, 2.0, -0.5])
    assert isinstance(found, LowRank) and found.rank == 4
    assert ((dense(found) - expected(deltas, [1.0, 2.0, -0.5])).abs() <= bound(deltas, [1.0, 2.0, -0.5])).all()


def test_changes_with_one_left_factor_keep_its_rank() -> None:
    left = gaussian(5, ROWS, 4).float()
    deltas: list[Delta] = [LowRank(left, gaussian(seed, 4, COLUMNS).float()) for seed in range(3)]
    found = total(deltas, [1.0, 2.0, -0.5])
    assert isinstance(found, LowRank) and found.rank == 4
    assert ((dense(found) - expected(deltas, [1.0, 2.0, -0.5])).abs() <= bound(deltas, [1.0, 2.0, -0.5])).all()


def test_dora_changes_of_one_base_stay_dora() -> None:
    copy = BASE.clone()  # read twice, a base is two tensors
    found = total([dora(1), dora(2, base=copy), low_rank(3)], [1.0, 0.5, 2.0])
    assert isinstance(found, Dora) and found.low.rank == 9
    assert torch.allclose(found.row_scale, dora(1).row_scale + 0.5 * dora(2).row_scale, rtol=EPS)


def test_dora_changes_of_two_bases_become_dense() -> None:
    deltas: list[Delta] = [dora(1), dora(2, base=2 * BASE)]
    found = total(deltas, [1.0, 0.5])
    assert isinstance(found, Dense)
    assert ((dense(found) - expected(deltas, [1.0, 0.5])).abs() <= bound(deltas, [1.0, 0.5])).all()


@pytest.mark.parametrize("form", FORMS)
def test_scaling_keeps_the_form(form: str) -> None:
    delta: Delta = FORMS[form](4)
    scaled = scale(delta, -0.3)
    assert type(scaled) is type(delta)
    assert ((dense(scaled) + 0.3 * dense(delta)).abs() <= bound([delta], [-0.3])).all()
    assert scale(delta, 1.0) is delta


def test_a_dense_sum_keeps_wider_numbers_and_the_shape_of_the_weight() -> None:
    kernel = gaussian(1, ROWS, COLUMNS, 1)
    found = total([low_rank(1), Dense(kernel)], [1.0, 1.0])  # a factored convolution is flattened, a dense one is not
    assert isinstance(found, Dense) and found.shape == (ROWS, COLUMNS, 1) and found.tuned.dtype == torch.float64
    bf16 = total([Dense(BASE.bfloat16()), Dense(BASE.bfloat16())])
    assert isinstance(bf16, Dense) and bf16.tuned.dtype == torch.float32


def test_small_blocks_give_the_same_dense_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas: list[Delta] = [full(1), low_rank(2), dora(3)]
    whole = dense(total(deltas, [1.0, 2.0, 3.0]))
    monkeypatch.setattr("tvbases_hf.algebra.blocks.BLOCK_NUMBERS", 3 * 29)  # ends within a row
    assert torch.allclose(dense(total(deltas, [1.0, 2.0, 3.0])), whole, rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("forms", [["low-rank"] * 3, ["dora", "low-rank", "dora"], ["dense", "low-rank", "dora"]])
def test_bases_are_the_dense_sums_of_the_columns(forms: list[str]) -> None:
    deltas: list[Delta] = [FORMS[form](seed) for seed, form in enumerate(forms)]
    mixing = gaussian(9, 3, 2)
    for found, column in zip(mix(deltas, mixing), mixing.T.tolist(), strict=True):
        assert ((dense(found) - expected(deltas, column)).abs() <= bound(deltas, column)).all()


@pytest.mark.parametrize("make", [low_rank, dora])
def test_adding_bases_up_costs_no_rank(make) -> None:
    deltas: list[Delta] = [make(seed) for seed in range(3)]
    found = total(mix(deltas, gaussian(9, 3, 5)))
    low = found.low if isinstance(found, Dora) else found
    assert isinstance(low, LowRank) and low.rank == 9  # not 5 x 9


def test_low_rank_sums_never_form_the_matrix() -> None:
    deltas = [LowRank(gaussian(s, 400, 2).float(), gaussian(s + 9, 2, 300).float()) for s in range(4)]
    with Largest() as largest:
        found = total(mix(deltas, torch.eye(4, dtype=torch.float64)), [0.1, 0.2, 0.3, 0.4])
        square_norm(found)
    assert largest.numbers <= 400 * 8 < 400 * 300


@pytest.mark.parametrize("form", FORMS)
def test_square_norm_is_that_of_the_dense_change(form: str) -> None:
    delta: Delta = FORMS[form](4)
    assert square_norm(delta) == pytest.approx(float(dense(delta).square().sum()), rel=1e-12)
