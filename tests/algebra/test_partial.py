"""The float32 routes to leading components and to polar factors: what they return obeys the laws, or it is nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oracles.matrices import EPS, gaussian, is_orthonormal, orthonormal, relative, with_gap, with_spectrum
from tvbases_hf.algebra import partial
from tvbases_hf.algebra import polar as polar_module
from tvbases_hf.algebra import svd as svd_module
from tvbases_hf.algebra.components import SVD
from tvbases_hf.algebra.linalg import OUTER_BLOCKS, OUTER_MIN_ROWS, outer_square
from tvbases_hf.algebra.partial import TOLERANCE, refined_svd, subspace_svd
from tvbases_hf.algebra.polar import exact_polar, refined_polar
from tvbases_hf.algebra.rank import RankRule
from tvbases_hf.algebra.svd import exact_svd, svd

SIDE, LONG = 160, 230
INDEX = 1 + torch.arange(SIDE, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(SIDE, dtype=torch.float64),
    "slow": INDEX**-0.2,
    "fast": INDEX**-1.0,
    "geometric": 0.97**INDEX,
    "one large": torch.cat([torch.tensor([10.0]), INDEX[1:] ** -0.3]),
}


def matrix_of(spectrum: str, shape: tuple[int, int]) -> Tensor:
    return with_spectrum(3, *shape, SPECTRA[spectrum]).float()


def leading(matrix: Tensor, found: SVD) -> Tensor:
    """[k] the share of every singular value that the residual |A v - sigma u| is, in float64."""
    U, S, V = found.U.double(), found.S.double(), found.V.double()
    return (matrix.double() @ V - U * S).norm(dim=0) / S


@pytest.mark.parametrize("shape", [(SIDE, LONG), (LONG, SIDE), (SIDE, SIDE)])
@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
def test_refined_components_are_an_exact_svd_of_a_matrix_that_close(spectrum: str, shape: tuple[int, int]) -> None:
    """Also without any gap, where the directions themselves are not determined."""
    matrix, rank = matrix_of(spectrum, shape), 20
    found = refined_svd(matrix, RankRule("absolute", rank))
    assert found is not None and found.rank == rank
    assert is_orthonormal(found.U) and is_orthonormal(found.V, 2 * TOLERANCE)
    assert leading(matrix, found).max() <= 1.5 * TOLERANCE
    expected = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(found.S.double(), expected[:rank], rtol=20 * EPS)
    captured = (found.U.double().T @ matrix.double()).square().sum()
    assert captured == pytest.approx(float(expected[:rank].square().sum()), rel=1e-6)


def test_a_correction_is_what_reaches_components_far_below_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, rule = matrix_of("fast", (SIDE, LONG)), RankRule("absolute", 60)
    found = refined_svd(matrix, rule)
    assert found is not None and leading(matrix, found).max() <= 1.5 * TOLERANCE
    largest, seen = partial._largest, []
    monkeypatch.setattr(partial, "_largest", lambda residuals: seen.append(largest(residuals)) or seen[-1])
    refined_svd(matrix, rule)
    assert len(seen) == 2 and seen[0] > TOLERANCE > 3 * seen[1]


@pytest.mark.parametrize("rule", ["energy:0.5", "energy:0.9", "gavish-donoho", "fraction:0.3", "7"])
@pytest.mark.parametrize("spectrum", ["slow", "geometric", "one large"])
def test_refined_components_are_as_many_as_the_rule_keeps(spectrum: str, rule: str) -> None:
    matrix = matrix_of(spectrum, (SIDE, LONG))
    found, parsed = refined_svd(matrix, RankRule.parse(rule)), RankRule.parse(rule)
    expected = parsed.of_spectrum(torch.linalg.svdvals(matrix.double()), *matrix.shape)
    assert found is not None and found.rank == expected == exact_svd(matrix, parsed).rank


@pytest.mark.parametrize(
    "route", [refined_svd, lambda matrix, rule: subspace_svd(matrix, rule.of_shape(*matrix.shape))]
)
def test_a_gap_determines_every_direction(route) -> None:
    matrix = with_gap(5, SIDE, LONG, 20).float()
    found = route(matrix, RankRule("absolute", 20))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    for mine, exact in ((found.U, left[:, :20]), (found.V, right[:20].T)):
        outside = mine.double() - exact @ (exact.T @ mine.double())
        assert outside.norm(dim=0).max() < 2 * TOLERANCE


@pytest.mark.parametrize("rule", ["20", "gavish-donoho", "energy:1"])
def test_components_that_float32_does_not_resolve_are_left_to_the_exact_route(rule: str) -> None:
    """Of rank 12, and noise: in float32 the squares of the noise look like components."""
    matrix = (gaussian(0, SIDE, 12) @ gaussian(1, 12, LONG)).float()
    assert refined_svd(matrix, RankRule.parse(rule)) is None
    steep = with_spectrum(2, SIDE, LONG, 10.0 ** (-8 * INDEX / SIDE)).float()
    assert refined_svd(steep, RankRule.parse(rule if rule != "20" else "90")) is None


@pytest.mark.parametrize("size", [1e-4, 0.3])
def test_a_wrong_eigendecomposition_is_mended_or_not_passed_on(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks are for: there is noise in the Gram matrix."""
    noise = gaussian(9, SIDE, SIDE).float()
    noise = noise + noise.T
    for module in (partial, polar_module):
        monkeypatch.setattr(
            module, "outer_square", lambda a: a @ a.T + size * (a @ a.T).abs().max() * (noise + noise.T)
        )
    matrix = matrix_of("slow", (SIDE, LONG))
    found = refined_svd(matrix, RankRule("absolute", 20))
    assert (found is None) == (size > 0.1)
    assert found is None or leading(matrix, found).max() <= 1.5 * TOLERANCE
    assert refined_polar(with_spectrum(1, SIDE, SIDE, INDEX**-1.0).float()) is None


def test_the_routes_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products where there is a gap, float32 eigenvectors where there is none, float64 where these do not do."""
    monkeypatch.setattr(svd_module, "FAST_MIN_SIDE", 64)
    monkeypatch.setattr(svd_module, "REFINED_MIN_SIDE", 64)
    rule = RankRule("absolute", 20)
    gap, slow = with_gap(5, SIDE, LONG, 20).float(), matrix_of("slow", (SIDE, LONG))
    low = (gaussian(0, SIDE, 30) @ gaussian(1, 30, LONG)).float()
    for matrix, rank, expected in (
        (gap, 20, subspace_svd(gap, 20)),
        (slow, 20, refined_svd(slow, rule)),
        (slow, "energy:0.3", refined_svd(slow, RankRule("energy", 0.3))),
        (low, 70, exact_svd(low, RankRule("absolute", 70))),
        (slow, 120, exact_svd(slow, RankRule("absolute", 120))),
        (slow, None, exact_svd(slow)),
        (1e-20 * slow, 20, exact_svd(1e-20 * slow, rule)),
        (1e20 * slow, 20, exact_svd(1e20 * slow, rule)),
    ):
        found = svd(matrix, rank)
        assert expected is not None and found.rank == expected.rank
        assert torch.equal(found.U, expected.U) and torch.equal(found.S, expected.S)


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (LONG, SIDE)])
@pytest.mark.parametrize("least", [0.5, 1e-2, 1e-4])
def test_the_refined_polar_factor_is_the_closest_orthonormal_matrix(shape: tuple[int, int], least: float) -> None:
    values = torch.logspace(0, torch.tensor(least).log10().item(), SIDE, dtype=torch.float64)
    matrix = with_spectrum(6, *shape, values).float()
    found = refined_polar(matrix)
    left, exact, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert found is not None and is_orthonormal(found.factor)
    # Rounding of the input turns a direction of singular value s by eps / s.
    assert relative(found.factor, left @ right) < 10 * EPS * (1 / exact).square().mean().sqrt()
    assert torch.allclose(found.values.sort().values, exact.sort().values, rtol=2e-5, atol=4 * EPS)


@pytest.mark.parametrize("copies", [2, 8])
def test_the_refined_polar_factor_of_copies_is_their_partial_isometry(copies: int) -> None:
    block = orthonormal(7, LONG, 12).float()
    own = orthonormal(8, LONG, 40).float()
    matrix = torch.cat([block] * copies + [own], dim=1)
    found, exact = refined_polar(matrix), exact_polar(matrix)
    assert found is not None and len(found.values) == len(exact.values) == 52
    assert relative(found.factor, exact.factor) < 40 * EPS
    for copy in range(1, copies):
        assert torch.allclose(found.factor[:, :12], found.factor[:, 12 * copy : 12 * copy + 12], atol=40 * EPS)


def test_the_refined_polar_factor_does_not_depend_on_the_scale() -> None:
    matrix = gaussian(10, LONG, SIDE).float()
    first = refined_polar(matrix)
    assert first is not None
    for scale in (1e-25, 1e25):
        found = refined_polar(scale * matrix)
        assert found is not None and relative(found.factor, first.factor) < 40 * EPS
        assert torch.allclose(found.values / scale, first.values, rtol=40 * EPS)
    assert refined_polar(torch.zeros(LONG, SIDE)) is None


@pytest.mark.parametrize("rows", [1, OUTER_BLOCKS * OUTER_MIN_ROWS - 1, OUTER_BLOCKS * OUTER_MIN_ROWS + 3])
def test_a_square_by_blocks_is_the_product_with_its_transpose(rows: int) -> None:
    matrix = gaussian(11, rows, 20)
    found = outer_square(matrix)
    assert torch.allclose(found, matrix @ matrix.T, rtol=0, atol=1e-13 * rows)
