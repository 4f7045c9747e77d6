"""Singular value decompositions against a dense float64 one, and what each route promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles.matrices import EPS, Largest, gaussian, is_orthonormal, orthonormal, relative, with_gap, with_spectrum
from tvbases_hf.algebra import svd as svd_module
from tvbases_hf.algebra.components import SVD
from tvbases_hf.algebra.delta import Delta, Dense, LowRank, dense
from tvbases_hf.algebra.partial import TOLERANCE, subspace_svd
from tvbases_hf.algebra.rank import RankRule
from tvbases_hf.algebra.svd import (
    FAST_MIN_SIDE,
    exact_svd,
    factored_svd,
    singular_values,
    svd,
)
from tvbases_hf.errors import ParameterError

SHAPES = [(30, 20), (20, 30), (25, 25), (1, 9), (9, 1)]
BIG = (FAST_MIN_SIDE, FAST_MIN_SIDE + 88)
RANK = 24  # of the big ones: few enough for the fast route


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, by a dense float64 SVD."""
    left, values, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def product(found: SVD) -> Tensor:
    return (found.U.double() * found.S.double()) @ found.V.double().T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 1, "fraction:0.4", "energy:0.9", "gavish-donoho"])
def test_the_leading_components_equal_those_of_a_dense_svd(shape: tuple[int, int], rank: int | str | None) -> None:
    matrix = with_spectrum(0, *shape, torch.logspace(1, -1, min(shape))).float()
    found = svd(matrix, rank)
    values = torch.linalg.svdvals(matrix.double())[: found.rank]
    assert is_orthonormal(found.U) and is_orthonormal(found.V)
    assert torch.allclose(found.S.double(), values, rtol=4 * EPS, atol=0)
    assert relative(product(found), truncated(matrix, found.rank)) < 20 * EPS
    if rank is not None:
        rule = RankRule.parse(rank)
        expected = rule.of_spectrum(torch.linalg.svdvals(matrix.double()), *shape)
        assert found.rank == expected


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e6))
def test_all_components_give_the_matrix_back(rows: int, columns: int, seed: int, scale: float) -> None:
    matrix = (scale * gaussian(seed, rows, columns)).float()
    found = svd(matrix)
    assert relative(product(found), matrix) < 20 * EPS
    assert is_orthonormal(found.U) and is_orthonormal(found.V)
    assert bool((found.S[:-1] >= found.S[1:]).all())


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_small_singular_values_of_a_float32_matrix_keep_float32_accuracy(shape: tuple[int, int]) -> None:
    """Graded over six decades. The Gram matrix alone, and even a float32 SVD, lose the small ones."""
    matrix = with_spectrum(1, *shape, torch.logspace(0, -6, 20, dtype=torch.float64)).float()
    expected = torch.linalg.svdvals(matrix.double())
    found = exact_svd(matrix)
    assert found.rank == 20
    error = ((found.S.double() - expected) / expected).abs()
    assert error.max() < 4 * EPS
    assert relative(product(found), matrix) < 20 * EPS
    small = matrix if shape[0] < shape[1] else matrix.T
    naive = torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0).sqrt().double()
    assert ((naive - expected) / expected).abs().max() > 0.1
    assert ((torch.linalg.svdvals(matrix).double() - expected) / expected).abs().max() > 1e-4


def test_float64_matrices_keep_float64_accuracy() -> None:
    matrix = with_spectrum(2, 30, 20, torch.logspace(0, -10, 20, dtype=torch.float64))
    expected = torch.linalg.svdvals(matrix)
    for delta in (matrix, LowRank(matrix, torch.eye(20, dtype=torch.float64))):
        found = svd(delta)
        assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float64
        assert torch.allclose(found.S, expected, rtol=1e-13, atol=1e-14)
        assert is_orthonormal(found.U, 1e-13) and is_orthonormal(found.V, 1e-13)
    big = with_gap(2, *BIG, RANK)
    assert relative(product(svd(big, RANK)), truncated(big, RANK)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", [exact_svd, svd, lambda matrix: subspace_svd(matrix, 6)])
def test_half_precision_matrices_are_computed_in_float32(
    dtype: torch.dtype, route: Callable[[Tensor], SVD | None]
) -> None:
    stored = with_spectrum(3, 60, 80, torch.logspace(0, -1, 6)).to(dtype)
    found = route(stored)
    assert found is not None and found.U.dtype == torch.float32
    assert relative(product(found), truncated(stored, found.rank)) < 2 * TOLERANCE
    assert found.rank >= 6


def test_the_difference_of_stored_numbers_is_what_is_decomposed() -> None:
    """In bfloat16 the difference itself would be rounded."""
    base = gaussian(4, 20, 30).bfloat16()
    tuned = (base.double() + 0.01 * gaussian(5, 20, 30)).bfloat16()
    exact = tuned.double() - base.double()
    assert relative(product(svd(Dense(tuned, base))), exact) < 20 * EPS


@pytest.mark.parametrize("rank", [None, 8, 30, "fraction:1", "energy:1"])
@pytest.mark.parametrize("route", ["auto", "exact", "fast"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_rounding_noise_is_never_a_component(shape: tuple[int, int], route: str, rank: int | str | None) -> None:
    factors = LowRank(gaussian(6, shape[0], 5).float(), gaussian(7, 5, shape[1]).float())
    stored = dense(factors).float()
    assert torch.linalg.svdvals(stored)[7] > 0  # there is noise
    for delta in (factors, stored, Dense(stored)):
        found = svd(delta, rank, route=route)
        assert found.rank == 5
        assert is_orthonormal(found.U) and is_orthonormal(found.V)
        assert relative(product(found), dense(factors)) < 20 * EPS


@pytest.mark.parametrize("route", ["auto", "exact", "fast"])
@pytest.mark.parametrize("rank", [None, 8, "energy:0.9", "gavish-donoho"])
@pytest.mark.parametrize(
    "zero", [torch.zeros(40, 60), torch.zeros(*BIG), LowRank(torch.zeros(40, 3), torch.zeros(3, 60))]
)
def test_a_zero_matrix_has_no_components(zero: Delta | Tensor, rank: int | str | None, route: str) -> None:
    found = svd(zero, rank, route=route)
    assert found.rank == 0
    assert found.U.shape == (zero.shape[0], 0) and found.V.shape == (zero.shape[1], 0)
    assert dense(found.low_rank()).shape == tuple(zero.shape) and not dense(found.low_rank()).any()


@pytest.mark.parametrize("shape", [BIG, BIG[::-1], (BIG[0], BIG[0])])
def test_the_fast_route_equals_the_exact_one_where_there_is_a_gap(shape: tuple[int, int]) -> None:
    matrix = with_gap(8, *shape, RANK).float()
    found = subspace_svd(matrix, RANK)
    assert found is not None and found.rank == RANK
    assert is_orthonormal(found.U) and is_orthonormal(found.V)
    assert relative(product(found), truncated(matrix, RANK)) < 10 * TOLERANCE
    assert torch.allclose(found.S, exact_svd(matrix, RankRule("absolute", RANK)).S, rtol=10 * EPS)
    auto = svd(matrix, RANK)
    assert torch.equal(auto.U, found.U) and torch.equal(auto.V, found.V)


@pytest.mark.parametrize("decay", [0.3, 0.5, 1.0])
def test_the_fast_route_is_an_exact_svd_of_a_matrix_that_close(decay: float) -> None:
    """Backward error: with E = (U S - A V) V^T, A + E has exactly these leading singular triplets."""
    values = (1 + torch.arange(BIG[0], dtype=torch.float64)) ** -decay
    values[RANK:] *= 0.5
    matrix = with_spectrum(9, *BIG, values).float()
    found = subspace_svd(matrix, RANK)
    assert found is not None
    exact, left, right, scale = matrix.double(), found.U.double(), found.V.double(), found.S.double()
    residual = left * scale - exact @ right
    assert ((residual / scale).norm(dim=0) <= TOLERANCE + 20 * EPS / scale * scale[0]).all()
    error = residual @ right.T
    assert error.norm() <= (TOLERANCE + 20 * EPS) * scale.norm()
    assert torch.allclose(torch.linalg.svdvals(exact + error)[:RANK], scale, rtol=20 * EPS, atol=0)
    assert ((exact + error).T @ left - right * scale).norm() < 20 * EPS * scale.norm()


@pytest.mark.parametrize("lead", [1e2, 1e3, 1e4])
def test_small_components_are_as_accurate_as_the_largest(lead: float) -> None:
    """One large component, then small ones with a gap after them: their residual is nothing beside the large one."""
    values = torch.full((BIG[0],), 0.5)
    values[:RANK], values[0] = 1.0, lead
    matrix = with_spectrum(10, *BIG, values).float()
    found = svd(matrix, RANK)
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    for mine, exact in ((found.U, left[:, :RANK]), (found.V, right[:RANK].T)):
        outside = mine.double() - exact @ (exact.T @ mine.double())
        assert outside.norm(dim=0).max() < 2 * TOLERANCE


def test_a_residual_that_is_small_beside_the_largest_component_says_nothing_of_the_others() -> None:
    """Why every component is asked: stopped by the norm of all residuals, directions would be off by 100 times more."""
    values = torch.full((BIG[0],), 0.5)
    values[:RANK], values[0] = 1.0, 1e4
    matrix = with_spectrum(10, *BIG, values).float()
    rough = subspace_svd(matrix, RANK, tolerance=0.1)
    assert rough is not None
    residual = matrix.double() @ rough.V.double() - rough.U.double() * rough.S
    assert residual.norm() < TOLERANCE * rough.S.norm()
    left = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :RANK]
    outside = rough.U.double() - left @ (left.T @ rough.U.double())
    assert outside.norm(dim=0).max() > 100 * TOLERANCE


def test_the_fast_route_gives_up_on_a_flat_spectrum_and_svd_falls_back() -> None:
    matrix = gaussian(11, *BIG).float()
    assert subspace_svd(matrix, RANK) is None
    found, exact = svd(matrix, RANK, route="fast"), svd(matrix, RANK, route="exact")
    assert torch.equal(found.U, exact.U) and torch.equal(found.S, exact.S) and torch.equal(found.V, exact.V)
    assert relative(product(found), truncated(matrix, RANK)) < 1e-4
    # A randomised SVD with two power steps and no error estimate is wrong by tens of per cent here.
    block = gaussian(12, BIG[1], RANK + 8)
    basis = torch.linalg.qr(matrix.double() @ (matrix.double().T @ (matrix.double() @ block))).Q
    assert relative(basis @ truncated(basis.T @ matrix.double(), RANK), truncated(matrix, RANK)) > 0.1


@pytest.mark.parametrize(("shape", "rank"), [((200, 300), 8), (BIG, 200), (BIG, "energy:0.5")])
def test_small_matrices_and_many_components_take_the_exact_route(
    shape: tuple[int, int], rank: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd_module, "subspace_svd", lambda *_: pytest.fail("the fast route was taken"))
    matrix = gaussian(13, *shape).float()
    found, exact = svd(matrix, rank), svd(matrix, rank, route="exact")
    assert torch.equal(found.U, exact.U) and torch.equal(found.S, exact.S)


@pytest.mark.parametrize("rank", [RANK, 100])
def test_the_same_matrix_gives_the_same_bits(rank: int) -> None:
    matrix = with_gap(14, *BIG, RANK).float()
    torch.manual_seed(1)
    first = svd(matrix, rank)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = svd(matrix.clone(), rank)
    assert torch.equal(first.U, second.U) and torch.equal(first.S, second.S) and torch.equal(first.V, second.V)
    assert torch.equal(torch.random.get_rng_state(), state)  # and leaves the user's random numbers alone


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(0, 12),
    seed=st.integers(0, 10_000),
    rule=st.sampled_from([None, 3, "fraction:0.3", "energy:0.8", "gavish-donoho"]),
)
def test_factored_equals_dense(rows: int, columns: int, rank: int, seed: int, rule: int | str | None) -> None:
    """Also where the factors are wider than the matrix."""
    delta = LowRank(gaussian(seed, rows, rank).float(), gaussian(seed + 1, rank, columns).float())
    found, expected = svd(delta, rule), svd(dense(delta), rule)
    assert found.rank == expected.rank
    assert is_orthonormal(found.U) and is_orthonormal(found.V)
    assert torch.allclose(found.S.double(), expected.S, rtol=4 * EPS)
    assert torch.allclose(product(found), product(expected), atol=1e-5 * float(expected.S.max()) if rank else 0)


def test_factored_svd_never_holds_a_matrix_of_full_size() -> None:
    rows, columns, rank = 1500, 1000, 6
    delta = LowRank(gaussian(15, rows, rank).float(), gaussian(16, rank, columns).float())
    with Largest() as seen:
        for rule in (None, 3, "energy:0.9", "gavish-donoho"):
            svd(delta, rule)
        singular_values(delta)
    assert seen.numbers <= rows * (rank + 1)
    with Largest() as seen:
        dense(delta)
    assert seen.numbers == rows * columns


def test_factored_svd_keeps_small_components() -> None:
    values = torch.logspace(0, -5, 6, dtype=torch.float64)
    left, right = orthonormal(17, 400, 6), orthonormal(18, 300, 6)
    delta = LowRank((left * values).float(), right.T.float())
    found = factored_svd(delta)
    expected = torch.linalg.svdvals(dense(delta))[:6]
    assert found.rank == 6
    assert torch.allclose(found.S.double(), expected, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4)])
def test_singular_values_are_all_of_them(shape: tuple[int, int]) -> None:
    matrix = gaussian(19, *shape).float()
    expected = torch.linalg.svdvals(matrix.double())
    for delta in (matrix, Dense(matrix), Dense(matrix.double() + 0.5, torch.full(shape, 0.5))):
        assert torch.allclose(singular_values(delta), expected, atol=1e-7)
        assert singular_values(delta).dtype == torch.float64
    factors = LowRank(gaussian(20, 30, 4), gaussian(21, 4, 20))
    assert torch.allclose(singular_values(factors), torch.linalg.svdvals(dense(factors))[:4], rtol=1e-12)


def test_parts_of_a_decomposition() -> None:
    found = svd(gaussian(22, 12, 9).float())
    assert found.keep(3).rank == 3 and torch.equal(found.keep(3).U, found.U[:, :3])
    assert relative(product(found.transposed()), product(found).T) < 1e-15
    assert relative(dense(found.keep(3).low_rank()), product(found.keep(3))) < 4 * EPS
    assert isinstance(found.low_rank(), LowRank) and found.low_rank().rank == 9


def test_what_has_no_svd_is_refused() -> None:
    with pytest.raises(ParameterError, match="unknown route 'quick'; choose auto, exact or fast"):
        svd(torch.zeros(3, 3), route="quick")
    for delta in (torch.zeros(3), Dense(torch.zeros(2, 3, 4))):
        with pytest.raises(ParameterError, match="needs a matrix; got shape"):
            svd(delta)
    with pytest.raises(ParameterError, match="is not a rank rule"):
        svd(torch.zeros(3, 3), "foo")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_route_stays_on_the_device_of_the_matrix() -> None:
    matrix = with_gap(23, *BIG, RANK).float()
    for delta in (matrix.cuda(), Dense(matrix.cuda()), svd(matrix, RANK).low_rank()):
        for route, rank in (("exact", None), ("exact", "gavish-donoho"), ("fast", RANK)):
            found = svd(delta, rank, route=route)
            assert (
                found.U.device
                == found.S.device
                == found.V.device
                == (delta.left.device if isinstance(delta, LowRank) else torch.device("cuda", 0))
            )
            assert relative(product(found).cpu(), truncated(matrix, found.rank)) < 1e-4
