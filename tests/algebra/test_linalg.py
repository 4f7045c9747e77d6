"""Polar factor, orthonormal bases, and where rounding noise begins, against dense float64 computations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles.matrices import EPS, gaussian, is_orthonormal, orthonormal, relative, with_spectrum
from tvbases_hf.algebra.linalg import (
    GRAM_CUTOFF,
    condition_number,
    fix_signs,
    negligible,
    orthonormal_columns,
    solve_psd,
    symmetric,
    working_dtype,
)
from tvbases_hf.algebra.polar import polar_factor

EPS64 = torch.finfo(torch.float64).eps
SHAPES = [(30, 12), (24, 24), (12, 30)]
sides = st.integers(1, 24)
seeds = st.integers(0, 10_000)


def procrustes(matrix: Tensor) -> Tensor:
    """P Q^T of X = P D Q^T: Algorithm 1, lines 9 to 14."""
    left, _, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    return left @ right


def whitening(matrix: Tensor) -> Tensor:
    """X (X^T X)^{-1/2} by the eigenvalues of X^T X, section 4.2."""
    exact = matrix.to(torch.float64)
    values, vectors = torch.linalg.eigh(exact.T @ exact)
    return exact @ (vectors / values.sqrt()) @ vectors.T


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor_is_procrustes(shape: tuple[int, int]) -> None:
    matrix = gaussian(0, *shape)
    assert relative(matrix, procrustes(matrix)) > 0.1
    assert relative(polar_factor(matrix), procrustes(matrix)) < 1e-11
    assert relative(polar_factor(matrix.float()), procrustes(matrix.float())) < EPS


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_whitening_and_procrustes_agree(shape: tuple[int, int]) -> None:
    """Proposition 4.1."""
    matrix = gaussian(1, *shape)
    assert relative(whitening(matrix), procrustes(matrix)) < 1e-11
    assert relative(polar_factor(matrix), whitening(matrix)) < 1e-11


@settings(deadline=None, max_examples=50)
@given(rows=sides, columns=sides, seed=seeds)
def test_no_orthonormal_matrix_is_closer_than_the_polar_factor(rows: int, columns: int, seed: int) -> None:
    matrix = gaussian(seed, max(rows, columns), min(rows, columns))
    factor = polar_factor(matrix)
    assert is_orthonormal(factor, 1e-9)
    distance = (matrix - factor).norm()
    rivals = [orthonormal(seed + offset, *matrix.shape) for offset in range(1, 20)]
    rivals += [torch.linalg.qr(factor + 0.01 * rival).Q for rival in rivals]
    # QR fixes signs its own way: let every rival take the better sign of each column.
    rivals = [rival * torch.sign((rival * matrix).sum(0)) for rival in rivals]
    assert all(distance <= (matrix - rival).norm() + 1e-9 for rival in rivals)


@settings(deadline=None, max_examples=30)
@given(rows=sides, columns=sides, seed=seeds, scale=st.sampled_from([1e-12, 0.3, 1e12]))
def test_polar_factor_ignores_scale_and_follows_rotations(rows: int, columns: int, seed: int, scale: float) -> None:
    matrix = with_spectrum(seed, rows, columns, torch.linspace(1, 0.1, min(rows, columns)))
    left, right = orthonormal(seed + 1, rows, rows), orthonormal(seed + 2, columns, columns)
    expected = left @ polar_factor(matrix) @ right
    assert torch.allclose(polar_factor(scale * left @ matrix @ right), expected, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copies", [2, 3, 7])
def test_copies_of_a_column_share_its_direction(copies: int, dtype: torch.dtype) -> None:
    matrix = gaussian(2, 40, 5).to(dtype)
    factor = polar_factor(matrix.repeat(1, copies))
    expected = procrustes(matrix).repeat(1, copies) / math.sqrt(copies)
    assert factor.isfinite().all()
    assert relative(factor, expected) < 10 * torch.finfo(dtype).eps
    # An arbitrary completion to orthonormal columns, which P Q^T takes from rounding noise, is far from that.
    assert relative(procrustes(matrix.repeat(1, copies)), expected) > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor_of_a_rank_deficient_matrix_is_its_partial_isometry(shape: tuple[int, int]) -> None:
    left, right = orthonormal(3, shape[0], 4), orthonormal(4, shape[1], 4)
    matrix = (left * torch.tensor([3.0, 1.0, 0.1, 1e-3], dtype=torch.float64)) @ right.T
    assert relative(polar_factor(matrix.float()), left @ right.T) < 4 * EPS * 3.0 / 1e-3  # rounding over the smallest
    assert torch.linalg.matrix_rank(polar_factor(matrix.float()).double(), rtol=1e-3) == 4


@pytest.mark.parametrize("shape", [*SHAPES, (5, 0), (0, 5), (1, 1)])
def test_polar_factor_of_zero_is_zero(shape: tuple[int, int]) -> None:
    factor = polar_factor(torch.zeros(shape))
    assert factor.shape == shape and factor.dtype == torch.float32
    assert not factor.any() and factor.isfinite().all()


def test_polar_factor_keeps_small_genuine_directions() -> None:
    """A concatenation of T k = n singular vectors is square, its smallest singular value about 1 / n."""
    values = torch.linspace(1, 0.5, 300)
    values[-1] = 2e-5
    matrix = with_spectrum(5, 300, 300, values).float()
    assert relative(polar_factor(matrix), procrustes(matrix)) < 1e-5
    assert negligible(matrix.shape) < 2e-5 < max(matrix.shape) * EPS  # the usual cut-off would drop it


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 150), columns=st.integers(2, 150), rank=st.integers(1, 40), seed=seeds)
def test_rounding_noise_of_a_low_rank_product_is_negligible(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    product = gaussian(seed, rows, rank).float() @ gaussian(seed + 1, rank, columns).float()
    values = torch.linalg.svdvals(product.double())
    assert int((values > negligible(product.shape) * values[0]).sum()) <= rank


def test_rounding_noise_grows_with_the_root_of_the_sides() -> None:
    assert negligible((100, 300)) == pytest.approx(20 * EPS)
    assert negligible((100, 300), torch.bfloat16) == negligible((100, 300), torch.float32)
    assert negligible((100, 300), torch.float64) == pytest.approx(20 * EPS64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_columns_span_the_column_space_once(dtype: torch.dtype) -> None:
    space = orthonormal(6, 50, 4)
    matrix = (space @ gaussian(7, 4, 9)).to(dtype)
    found = orthonormal_columns(matrix)
    assert found.shape == (50, 4) and found.dtype == dtype
    assert is_orthonormal(found, 20 * torch.finfo(dtype).eps)
    assert relative(space @ (space.T @ found.double()), found) < 100 * torch.finfo(dtype).eps


def test_orthonormal_columns_leaves_out_what_is_below_the_cutoff() -> None:
    matrix = with_spectrum(8, 30, 6, [1, 1, 1, 1, 1e-3, 1e-5])
    assert [orthonormal_columns(matrix, cutoff=cutoff).shape[1] for cutoff in (1e-6, 1e-4, 1e-2)] == [6, 5, 4]
    assert orthonormal_columns(torch.zeros(30, 6)).shape == (30, 0)
    assert orthonormal_columns(torch.zeros(30, 0)).shape == (30, 0)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 12), rank=st.integers(1, 12), seed=seeds)
def test_solve_psd_is_the_solution_of_least_norm(size: int, rank: int, seed: int) -> None:
    factor = gaussian(seed, size, min(rank, size))
    matrix, right = factor @ factor.T, factor @ gaussian(seed + 1, min(rank, size), 3)
    expected = torch.linalg.pinv(factor @ factor.T, hermitian=True, rtol=GRAM_CUTOFF) @ right
    condition = float(torch.linalg.cond(factor)) ** 2
    assert relative(solve_psd(matrix, right), expected) < 1e3 * condition * EPS64


def test_condition_number_is_the_ratio_of_extreme_singular_values() -> None:
    assert condition_number(with_spectrum(9, 20, 3, [5, 1, 0.5])) == pytest.approx(10)
    assert condition_number(gaussian(10, 20, 2).repeat(1, 2)) == math.inf
    assert condition_number(torch.zeros(4, 2)) == math.inf


def test_fix_signs_makes_the_largest_entry_of_every_column_positive() -> None:
    vectors = gaussian(11, 9, 5)
    fixed = fix_signs(vectors)
    assert torch.equal(fixed.abs(), vectors.abs())
    assert (fixed.amax(0) == fixed.abs().amax(0)).all() and not (vectors.amax(0) == vectors.abs().amax(0)).all()
    assert torch.equal(fix_signs(vectors * torch.tensor([1, -1, -1, 1, -1])), fixed)
    assert not fix_signs(torch.zeros(3, 2)).any()


def test_symmetric_is_the_symmetric_part_in_float64() -> None:
    matrix = gaussian(12, 5, 5).float()
    assert torch.equal(symmetric(matrix), (matrix.double() + matrix.double().T) / 2)


def test_matrices_are_decomposed_in_float32_at_least() -> None:
    given_as = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    done_in = [working_dtype(torch.zeros(1, dtype=dtype)) for dtype in given_as]
    assert done_in == [torch.float32, torch.float32, torch.float32, torch.float64]
