"""Merges in the joint coordinates of the vectors: Iso-CTS and data-free RegMean, dense and in factors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from tvbases_hf.algebra.core import Core
from tvbases_hf.algebra.delta import Delta, Dense, LowRank, dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.iso import iso_c, iso_cts
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.methods.regmean_datafree import regmean_datafree

SHAPE = (30, 22)
WEIGHTS = [1.0, -0.5, 2.0]


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(count: int = 3, rank: int = 4) -> list[Delta]:
    """float64 factors of 12 columns together, so that the joint spaces are smaller than the matrices."""
    return [LowRank(gaussian(seed, SHAPE[0], rank), gaussian(seed + 9, rank, SHAPE[1])) for seed in range(count)]


def whole(deltas: list[Delta]) -> list[Delta]:
    return [Dense(dense(delta)) for delta in deltas]


def full(count: int = 3) -> list[Delta]:
    return [Dense(gaussian(seed, *SHAPE)) for seed in range(count)]


def matrices(deltas: list[Delta], weights: list[float]) -> list[Tensor]:
    return [weight * dense(delta) for delta, weight in zip(deltas, weights, strict=True)]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def test_coordinates_lose_nothing_and_are_small() -> None:
    deltas = factors()
    core = Core.of(deltas, WEIGHTS)
    assert {tuple(matrix.shape) for matrix in core.matrices} == {(12, 12)}
    for matrix, expected in zip(core.matrices, matrices(deltas, WEIGHTS), strict=True):
        change = core.change(matrix)
        assert isinstance(change, LowRank) and close(dense(change), expected)
    assert Core.of(factors(rank=9), WEIGHTS).left is not None  # 27 columns of 30 rows
    assert Core.of(factors(rank=9), WEIGHTS).right is None  # and 27 rows of 22 columns


# Iso-CTS


def iso_cts_reference(tasks: list[Tensor], common: float) -> Tensor:
    """As the paper's Algorithm 2, by full decompositions: of the r directions of the sum k are common."""
    summed = torch.stack(tasks).sum(0)
    left, values, right = torch.linalg.svd(summed, full_matrices=False)
    rank = int((values > 1e-9 * values[0]).sum())
    own = round((rank - int(common * rank)) / len(tasks))
    kept = rank - own * len(tasks)
    U, S, V = [left[:, :kept]], [values[:kept]], [right[:kept].T]
    for task in tasks:
        rest = task - left[:, :kept] @ left[:, :kept].T @ task
        found = torch.linalg.svd(rest, full_matrices=False)
        U.append(found.U[:, :own])
        S.append(found.S[:own])
        V.append(found.Vh[:own].T)
    sides = [torch.linalg.svd(torch.cat(side, dim=1), full_matrices=False) for side in (U, V)]
    return torch.cat(S).mean() * (sides[0].U @ sides[0].Vh) @ (sides[1].U @ sides[1].Vh).T


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("make", [full, factors])
def test_iso_cts_is_the_algorithm_of_the_paper(make, common: float) -> None:
    deltas = make()
    expected = iso_cts_reference(matrices(deltas, WEIGHTS), common)
    assert close(dense(iso_cts(deltas, WEIGHTS, common=common)), expected)
    assert not close(dense(iso_c(deltas, WEIGHTS)), expected, 1e-2)


def test_iso_cts_of_factors_stays_in_factors() -> None:
    found = iso_cts(factors(), WEIGHTS)
    assert isinstance(found, LowRank) and found.rank <= 12


@pytest.mark.parametrize("make", [full, factors])
def test_iso_cts_of_common_directions_alone_is_iso_c(make) -> None:
    assert close(dense(iso_cts(make(), WEIGHTS, common=1.0)), dense(iso_c(make(), WEIGHTS)))


def test_a_vector_of_zeros_takes_no_directions_from_the_others() -> None:
    zero = LowRank(torch.zeros(SHAPE[0], 1), torch.zeros(1, SHAPE[1]))
    assert close(dense(iso_cts([*factors(), zero], [*WEIGHTS, 1.0])), dense(iso_cts(factors(), WEIGHTS)))


# Data-free RegMean


def moments(task: Tensor, side: str) -> Tensor:
    square = task.T @ task if side == "row" else task @ task.T
    return square / square.trace()


@pytest.mark.parametrize("make", [full, factors])
@pytest.mark.parametrize("side", ["row", "column"])
def test_regmean_is_the_closed_form(side: str, make) -> None:
    tasks, ridge = matrices(make(), WEIGHTS), 0.1
    size = SHAPE[1] if side == "row" else SHAPE[0]
    share = ridge * len(tasks) / size
    total = torch.stack([moments(task, side) for task in tasks]).sum(0) + share * torch.eye(size, dtype=torch.float64)
    products = [task @ moments(task, side) if side == "row" else moments(task, side) @ task for task in tasks]
    right = torch.stack(products).sum(0) + share * torch.stack(tasks).mean(0)
    expected = right @ total.inverse() if side == "row" else total.inverse() @ right
    found = regmean_datafree(make(), WEIGHTS, side=side, ridge=ridge)  # type: ignore[arg-type]
    assert close(dense(found), expected)
    assert isinstance(found, LowRank) == (make is factors)


@pytest.mark.parametrize("make", [full, factors])
def test_regmean_of_both_sides_solves_its_equation(make) -> None:
    tasks, ridge = matrices(make(), WEIGHTS), 0.05
    share = ridge * len(tasks) / (SHAPE[0] * SHAPE[1])
    both = [(moments(task, "column"), moments(task, "row")) for task in tasks]
    left = sum((torch.kron(a, c) for a, c in both), share * torch.eye(SHAPE[0] * SHAPE[1], dtype=torch.float64))
    right = share * torch.stack(tasks).mean(0)
    right = sum((a @ task @ c for task, (a, c) in zip(tasks, both, strict=True)), right)
    expected = torch.linalg.solve(left, right.reshape(-1)).reshape(SHAPE)
    assert close(dense(regmean_datafree(make(), WEIGHTS, side="both", ridge=ridge)), expected, 1e-5)


@pytest.mark.parametrize("side", ["row", "column", "both"])
def test_the_least_ridge_is_above_the_rounding_of_one_vector_of_low_rank(side: str) -> None:
    task = gaussian(0, SHAPE[0], 2) @ gaussian(1, 2, SHAPE[1])
    found = regmean_datafree([Dense(task)], [1.0], side=side, ridge=1e-6)  # type: ignore[arg-type]
    assert close(dense(found), task, 1e-6)
    for less in (0.0, 1e-7, 1e-300):
        with pytest.raises(ParameterError, match=r"ridge of regmean_datafree .* at least 1e-06"):
            METHODS["regmean_datafree"].checked({"ridge": less})


def test_an_equation_of_both_sides_that_the_steps_do_not_solve_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three vectors of fast decay in directions of their own, with a small ridge: one entry in six is wrong."""
    monkeypatch.setattr(sys.modules[regmean_datafree.__module__], "_warned", set())
    decay = torch.exp(-0.5 * torch.arange(16, dtype=torch.float64))
    tasks = []
    for seed in range(3):
        left, _, right = torch.linalg.svd(gaussian(seed, 24, 16), full_matrices=False)
        tasks.append(Dense(left * decay @ right))
    regmean_datafree(tasks, [1.0] * 3, side="both", ridge=1e-4)
    regmean_datafree(tasks, [1.0] * 3, side="both", ridge=1e-4)
    assert caplog.text.count("of the equation of both sides is left (first: a weight [24, 16])") == 1


@pytest.mark.parametrize("ridge", [0.01, 1e-4])
def test_an_equation_of_both_sides_of_decaying_spectra_is_solved(
    ridge: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular values from 1 to 1/80, which plain conjugate gradients leave unsolved."""
    monkeypatch.setattr(sys.modules[regmean_datafree.__module__], "_warned", set())
    decay = 10 ** (-2 * torch.arange(16, dtype=torch.float64) / 16)
    svds = [torch.linalg.svd(gaussian(seed, *SHAPE)[:24, :16], full_matrices=False) for seed in range(4)]
    tasks = [left * decay @ right for left, _, right in svds]
    share = ridge * len(tasks) / (24 * 16)
    both = [(moments(task, "column"), moments(task, "row")) for task in tasks]
    left = sum((torch.kron(a, c) for a, c in both), share * torch.eye(24 * 16, dtype=torch.float64))
    right = sum((a @ task @ c for task, (a, c) in zip(tasks, both, strict=True)), share * torch.stack(tasks).mean(0))
    expected = torch.linalg.solve(left, right.reshape(-1)).reshape(24, 16)
    found = regmean_datafree([Dense(task) for task in tasks], [1.0] * 4, side="both", ridge=ridge)
    assert close(dense(found), expected, 1e-3) and not caplog.text


@pytest.mark.parametrize("side", ["row", "column", "both"])
def test_regmean_adds_what_is_apart_and_does_not_count_copies(side: str) -> None:
    first, second = torch.zeros(2, *SHAPE, dtype=torch.float64)
    first[:10, :8], second[10:20, 8:16] = gaussian(0, 10, 8), gaussian(1, 10, 8)
    options = {"side": side, "ridge": 1e-6}
    apart = regmean_datafree([Dense(first), Dense(second)], [1.0, 1.0], **options)  # type: ignore[arg-type]
    assert close(dense(apart), first + second, 1e-3)
    copies = regmean_datafree([Dense(first)] * 3, [1.0] * 3, **options)  # type: ignore[arg-type]
    assert close(dense(copies), first, 1e-3)
