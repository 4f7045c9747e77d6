"""TSV-Merge, its ablations, truncation and interference against the paper's formulas written out in float64."""

from __future__ import annotations

import itertools
import json
import math
import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles.matrices import EPS, gaussian, is_orthonormal, orthonormal, relative, with_gap, with_spectrum
from tvbases_hf.algebra import svd as svd_module
from tvbases_hf.algebra.components import SVD
from tvbases_hf.algebra.delta import Dense, LowRank, dense
from tvbases_hf.algebra.interference import interference
from tvbases_hf.algebra.polar import polar_factor
from tvbases_hf.algebra.svd import FAST_MIN_SIDE, svd
from tvbases_hf.methods.tsv import assemble, default_rank, truncate, tsv_merge

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "bench_tsv.py"
SHAPES = [(96, 64), (64, 96), (72, 72)]
TOLERANCE = 1e-4  # float32 vectors, amplified by the condition of their concatenation

Parts = tuple[Tensor, Tensor, Tensor]  # U [n, k], S [k], V [m, k]


def components(matrix: Tensor, rank: int | None = None) -> Parts:
    left, values, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank].T


def concatenated(matrices: Sequence[Tensor], rank: int | None) -> Parts:
    """Algorithm 1, lines 1 to 8."""
    left, values, right = zip(*(components(matrix, rank) for matrix in matrices), strict=True)
    return torch.cat(left, 1), torch.cat(values), torch.cat(right, 1)


def procrustes(matrix: Tensor) -> Tensor:
    """Lines 9 to 14."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def reference(
    matrices: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    low_rank: bool = True,
    orthogonalize: bool = True,
) -> Tensor:
    """Algorithm 1 without theta_pre and alpha: U_orth Sigma V_orth^T."""
    small = min(matrices[0].shape)
    kept = (rank or max(1, small // len(matrices))) if low_rank else small
    left, values, right = concatenated(matrices, kept)
    if weights is not None:
        values = values * torch.tensor(weights, dtype=torch.float64).repeat_interleave(kept)
    if orthogonalize:
        left, right = procrustes(left), procrustes(right)
    return left * values @ right.T


def tasks(count: int, shape: tuple[int, int], rank: int | None = None, seed: int = 0) -> list[Tensor]:
    """Matrices with a gap after their share of the components, which overlap as those of real tasks do."""
    rank = rank or max(1, min(shape) // count)
    common = with_gap(seed, *shape, rank)
    return [(with_gap(seed + 10 * i + 1, *shape, rank) + 0.01 * common).float() for i in range(count)]


def changes(matrices: Sequence[Tensor]) -> list[Dense]:
    return [Dense(matrix) for matrix in matrices]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5, 8, 13, 20])
def test_merge_equals_the_dense_reference(count: int, shape: tuple[int, int]) -> None:
    matrices = tasks(count, shape)
    merged = tsv_merge(changes(matrices))
    assert isinstance(merged, LowRank) and merged.rank == count * (min(shape) // count)
    assert relative(dense(merged), reference(matrices)) < TOLERANCE
    assert relative(sum(matrices, torch.zeros(shape)), reference(matrices)) > 0.1


@pytest.mark.parametrize("shape", [(FAST_MIN_SIDE, 640), (640, FAST_MIN_SIDE), (FAST_MIN_SIDE, FAST_MIN_SIDE)])
def test_merge_by_the_fast_route_equals_the_dense_reference(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd_module, "exact_svd", lambda *_: pytest.fail("the exact route was taken"))
    matrices = tasks(4, shape, rank=25)
    assert relative(dense(tsv_merge(changes(matrices), rank=25)), reference(matrices, rank=25)) < TOLERANCE


@pytest.mark.parametrize("lead", [10.0, 1e2, 1e4])
def test_merge_equals_the_dense_reference_where_one_component_dominates(lead: float) -> None:
    """The small components weigh as much as the large one in the orthogonalisation."""
    values = torch.full((FAST_MIN_SIDE,), 0.5)
    values[:24], values[0] = 1.0, lead
    matrices = [with_spectrum(50 * i, FAST_MIN_SIDE, 640, values).float() for i in range(4)]
    assert relative(dense(tsv_merge(changes(matrices), rank=24)), reference(matrices, rank=24)) < TOLERANCE


def test_twenty_tasks_by_the_fast_route_equal_the_dense_reference() -> None:
    shape = (FAST_MIN_SIDE, FAST_MIN_SIDE + 8)
    matrices = tasks(20, shape)
    assert relative(dense(tsv_merge(changes(matrices))), reference(matrices)) < TOLERANCE


@pytest.mark.parametrize("spectrum", ["equal", "slow"])
@pytest.mark.parametrize(("count", "shape"), [(3, (60, 90)), (4, (90, 60)), (3, (FAST_MIN_SIDE, 600))])
def test_without_a_gap_the_factors_are_orthonormal_and_capture_the_same_energy(
    count: int, shape: tuple[int, int], spectrum: str
) -> None:
    """Equal singular values leave the components undefined: any will do."""
    small = min(shape)
    rank = small // count if small < 500 else 24
    values = torch.ones(small) if spectrum == "equal" else (1 + torch.arange(small)) ** -0.2
    matrices = [with_spectrum(100 * i, *shape, values).float() for i in range(count)]
    parts = [svd(matrix, rank) for matrix in matrices]
    pairs = zip(parts, matrices, strict=True)
    captured = torch.stack([(part.U.double().T @ matrix.double()).square().sum() for part, matrix in pairs])
    best = torch.stack([components(matrix, rank)[1].square().sum() for matrix in matrices])
    assert torch.allclose(captured, best, rtol=1e-3)
    merged = assemble(parts, [1.0] * count)
    scale = torch.cat([part.S for part in parts])
    assert is_orthonormal(merged.left / scale, 1e-4) and is_orthonormal(merged.right.T, 1e-4)
    assert torch.allclose(merged.left.norm(dim=0), scale, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_each_step_can_be_left_out(orthogonalize: bool, low_rank: bool, shape: tuple[int, int]) -> None:
    """Table 4."""
    matrices = tasks(4, shape)
    merged = dense(tsv_merge(changes(matrices), low_rank=low_rank, orthogonalize=orthogonalize))
    assert relative(merged, reference(matrices, low_rank=low_rank, orthogonalize=orthogonalize)) < TOLERANCE
    for other in itertools.product((True, False), repeat=2):
        if other != (low_rank, orthogonalize):
            assert relative(merged, reference(matrices, low_rank=other[0], orthogonalize=other[1])) > 0.01


def test_with_neither_step_the_merge_is_the_sum() -> None:
    matrices = tasks(4, SHAPES[0])
    merged = dense(tsv_merge(changes(matrices), low_rank=False, orthogonalize=False))
    assert relative(merged, sum(matrices, torch.zeros(SHAPES[0]))) < 20 * EPS


def test_whole_square_matrices_orthogonalized_give_the_mean() -> None:
    """U U^T = V V^T = T I, so both polar factors divide by sqrt(T) (the proof of theorem 6.1)."""
    matrices = tasks(4, (48, 48))
    merged = dense(tsv_merge(changes(matrices), low_rank=False))
    assert relative(merged, sum(matrices, torch.zeros(48, 48)) / 4) < 20 * EPS


@pytest.mark.parametrize("rank", [3, "fraction:0.1", 0.1])
def test_rank_sets_the_components_per_task(rank: int | str | float) -> None:
    matrices = tasks(4, (60, 90))
    kept = 3 if rank == 3 else 6
    merged = tsv_merge(changes(matrices), rank=rank)
    assert isinstance(merged, LowRank) and merged.rank == 4 * kept
    assert relative(dense(merged), reference(matrices, rank=kept)) < TOLERANCE


def test_each_task_may_keep_a_rank_of_its_own() -> None:
    matrices = [with_spectrum(i, 40, 50, torch.ones(rank)).float() for i, rank in enumerate((3, 9))]
    merged = tsv_merge(changes(matrices), rank="energy:0.99")
    assert isinstance(merged, LowRank) and merged.rank == 12


@settings(deadline=None, max_examples=20)
@given(weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3).filter(lambda w: max(map(abs, w)) > 0.1))
def test_weights_scale_the_singular_values_also_negative_ones(weights: list[float]) -> None:
    matrices = tasks(3, (30, 45))
    merged = dense(tsv_merge(changes(matrices), weights))
    assert relative(merged, reference(matrices, weights)) < TOLERANCE
    assert torch.allclose(merged, -dense(tsv_merge(changes(matrices), [-w for w in weights])))


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(4)), scale=st.sampled_from([1e-6, 3.0, 1e6]))
def test_merge_and_interference_follow_order_and_scale_of_the_tasks(order: list[int], scale: float) -> None:
    matrices = tasks(4, (48, 60))
    merged, weights = dense(tsv_merge(changes(matrices), [1, 2, 3, 4])), [float(1 + i) for i in order]
    again = dense(tsv_merge(changes([scale * matrices[i] for i in order]), weights))
    assert relative(again, scale * merged) < TOLERANCE
    parts = [svd(matrix, 12) for matrix in matrices]
    assert interference([parts[i] for i in order]) == pytest.approx(interference(parts), rel=1e-9)


@pytest.mark.parametrize("form", ["low-rank", "mixed"])
def test_low_rank_changes_merge_as_the_same_dense_ones(form: str) -> None:
    """Also where their rank is below the components wanted: the rest of a dense one is rounding noise."""
    factors = [LowRank(gaussian(i, 80, 5).float(), gaussian(i + 50, 5, 60).float()) for i in range(4)]
    plain = changes([dense(delta).float() for delta in factors])
    given_as = factors if form == "low-rank" else [*factors[:2], *plain[2:]]
    merged, expected = tsv_merge(given_as), tsv_merge(plain)
    assert isinstance(merged, LowRank) and isinstance(expected, LowRank) and merged.rank == expected.rank == 20
    assert relative(dense(merged), dense(expected)) < TOLERANCE
    assert relative(dense(merged), reference([dense(delta) for delta in factors], rank=5)) < TOLERANCE


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_a_task_merged_with_its_copies_is_that_task(copies: int) -> None:
    matrix = tasks(1, (40, 60), rank=8)[0]
    merged = dense(tsv_merge(changes([matrix] * copies), rank=8))
    assert relative(merged, reference([matrix], rank=8)) < TOLERANCE
    assert relative(merged, copies * reference([matrix], rank=8)) > 0.4  # what the sum would be


def test_a_task_minus_its_copy_is_nothing() -> None:
    matrix = tasks(1, (40, 60), rank=8)[0]
    for merged in (tsv_merge(changes([matrix] * 2), [1, -1], rank=8), tsv_merge(changes([matrix, -matrix]), rank=8)):
        assert dense(merged).norm() < TOLERANCE * matrix.norm()


def test_two_copies_among_other_tasks_count_as_one_direction_each() -> None:
    matrices = tasks(3, (60, 80), rank=6)
    merged = dense(tsv_merge(changes([*matrices, matrices[0]]), rank=6))
    left, values, right = concatenated([*matrices, matrices[0]], 6)
    # The partial isometry of U: the pseudo-inverse square root of U U^T in place of the inverse one.
    isometry = []
    for side in (left, right):
        spectrum, vectors = torch.linalg.eigh(side @ side.T)
        keep = spectrum > 1e-10
        isometry.append((vectors[:, keep] / spectrum[keep].sqrt()) @ vectors[:, keep].T @ side)
    assert relative(merged, isometry[0] * values @ isometry[1].T) < TOLERANCE


def test_a_zero_task_changes_nothing() -> None:
    matrices, zero = tasks(3, (40, 60), rank=8), torch.zeros(40, 60)
    expected = dense(tsv_merge(changes(matrices), rank=8))
    for empty in (Dense(zero), LowRank(zero[:, :4], zero[:4])):
        merged = dense(tsv_merge([*changes(matrices), empty], rank=8))
        assert relative(merged, expected) < 1e-12
    # Unlike the arbitrary singular vectors that an SVD returns for zero, which push the other tasks aside.
    assert relative(reference([*matrices, zero], rank=8), expected) > 0.1


@pytest.mark.parametrize("shape", [(20, 30), (FAST_MIN_SIDE, FAST_MIN_SIDE), (1, 7)])
def test_zero_tasks_merge_to_zero(shape: tuple[int, int]) -> None:
    merged = dense(tsv_merge(changes([torch.zeros(shape)] * 14)))
    assert merged.shape == shape and not merged.any() and merged.isfinite().all()
    assert interference([svd(torch.zeros(shape), 3)] * 2) == 0


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (1, 5), (6, 6)])
def test_more_tasks_than_the_smaller_side_keep_one_component_each(shape: tuple[int, int]) -> None:
    matrices = [(0.3 * with_spectrum(i, *shape, [1.0]) + with_gap(90 + i, *shape, 1)).float() for i in range(20)]
    merged = tsv_merge(changes(matrices))
    assert isinstance(merged, LowRank) and merged.rank == 20
    assert relative(dense(merged), reference(matrices)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_one_task_merges_to_itself(shape: tuple[int, int]) -> None:
    matrix = tasks(1, shape, rank=20)[0]
    assert relative(dense(tsv_merge(changes([matrix]))), matrix) < TOLERANCE
    assert relative(dense(tsv_merge(changes([matrix]), rank=20)), reference([matrix], rank=20)) < TOLERANCE


def test_a_rank_above_the_numerical_one_gives_the_merge_at_the_numerical_one() -> None:
    matrices = [with_spectrum(i, 50, 40, torch.linspace(2, 1, 4)).float() for i in range(3)]
    merged = tsv_merge(changes(matrices), rank=30)
    assert isinstance(merged, LowRank) and merged.rank == 12
    assert relative(dense(merged), reference(matrices, rank=4)) < TOLERANCE


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (8, 4, 3, 3), (1,), ()])
def test_what_is_no_matrix_takes_the_weighted_mean(shape: tuple[int, ...]) -> None:
    tensors = [gaussian(i, *shape).float() for i in range(3)]
    merged = dense(tsv_merge(changes(tensors), [1.0, -2.0, 0.5]))
    expected = (tensors[0].double() - 2 * tensors[1].double() + 0.5 * tensors[2].double()) / 3
    assert merged.shape == shape and torch.allclose(merged, expected, rtol=1e-14)


def sti(matrices: Sequence[Tensor], rank: int) -> float:
    """Equation 7."""
    left, values, right = concatenated(matrices, rank)
    identity = torch.eye(len(values), dtype=torch.float64)
    return float(((left.T @ left - identity) @ values.diag() @ (right.T @ right - identity)).abs().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 5])
def test_interference_equals_the_formula(count: int, shape: tuple[int, int]) -> None:
    matrices = tasks(count, shape)
    rank = min(shape) // count
    found = interference([svd(matrix, rank) for matrix in matrices])
    assert found == pytest.approx(sti(matrices, rank), rel=1e-4)
    assert found > 1


def test_interference_of_orthogonal_tasks_is_zero_and_of_one_task_too() -> None:
    left, right = orthonormal(0, 50, 12), orthonormal(1, 40, 12)
    parts = [SVD(left[:, i : i + 4], torch.ones(4).double(), right[:, i : i + 4]) for i in (0, 4, 8)]
    assert interference(parts) < 1e-12
    assert interference(parts[:1]) < 1e-12
    overlapping = SVD(orthonormal(2, 50, 4), torch.ones(4).double(), orthonormal(3, 40, 4))
    assert interference([*parts, overlapping]) > 0.1


def test_interference_of_two_copies_of_a_direction_is_the_overlap() -> None:
    """Appendix A: U^T U - I = [[0, 1], [1, 0]] on both sides, so |S_2| + |S_1|."""
    column, row = orthonormal(4, 9, 1), orthonormal(5, 7, 1)
    copies = [SVD(column, torch.tensor([value]), sign * row) for value, sign in ((3.0, 1), (2.0, -1))]
    assert interference(copies) == pytest.approx(5, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalization_removes_the_interference(shape: tuple[int, int]) -> None:
    parts = [svd(matrix, min(shape) // 5) for matrix in tasks(5, shape)]
    values = torch.cat([part.S for part in parts])
    merged = assemble(parts, [1.0] * 5)
    after = interference([SVD(merged.left / values, values, merged.right.T)])
    assert after < 1e-3 * interference(parts)
    untouched = assemble(parts, [1.0] * 5, orthogonalize=False)
    same = interference([SVD(untouched.left / values, values, untouched.right.T)])
    assert same == pytest.approx(interference(parts), rel=1e-4)


def test_where_the_components_do_not_fit_orthogonalization_lowers_the_interference() -> None:
    """U is wide then, U^T U a projection and not the identity."""
    parts = [svd(matrix, 20) for matrix in tasks(5, (40, 60), rank=20)]
    values = torch.cat([part.S for part in parts])
    merged = assemble(parts, [1.0] * 5)
    after = interference([SVD(merged.left / values, values, merged.right.T)])
    assert 0.01 * interference(parts) < after < 0.9 * interference(parts)


@settings(deadline=None, max_examples=25)
@given(count=st.integers(5, 14), side=st.integers(4, 16), share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_truncation_makes_the_orthogonalization_error_smaller(count: int, side: int, share: float, seed: int) -> None:
    """Theorem 6.1: for k <= n (T - 2 sqrt T) / T; and for whole matrices the error is exactly sqrt(n) (sqrt(T) - 1)."""
    limit = int(side * (count - 2 * math.sqrt(count)) / count)
    rank = max(1, round(share * limit))
    if rank > limit:
        return
    whole = [orthonormal(seed + i, side, side) for i in range(count)]

    def error(matrices: list[Tensor]) -> float:
        joined = torch.cat(matrices, 1)
        return float((joined - polar_factor(joined)).norm())

    assert error(whole) == pytest.approx(math.sqrt(side) * (math.sqrt(count) - 1), rel=1e-9)
    assert error([matrix[:, :rank] for matrix in whole]) <= error(whole) * (1 + 1e-12)


def test_default_rank_is_the_share_of_one_task() -> None:
    assert [default_rank(count).of_shape(64, 100) for count in (1, 2, 3, 20, 64, 100)] == [64, 32, 21, 3, 1, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_best_approximation_of_its_rank(shape: tuple[int, int]) -> None:
    """Eckart and Young: the error is the norm of the singular values left out."""
    matrix = with_spectrum(3, *shape, torch.logspace(0, -2, min(shape))).float()
    for delta in (Dense(matrix), Dense(matrix + 1, torch.ones(shape)), LowRank(matrix, torch.eye(shape[1]))):
        cut = truncate(delta, 7)
        exact = dense(delta)
        assert isinstance(cut, LowRank) and cut.rank == 7
        error = float((dense(cut) - exact).norm())
        assert error == pytest.approx(float(torch.linalg.svdvals(exact)[7:].norm()), rel=1e-4)


def test_truncation_keeps_what_is_no_matrix() -> None:
    for delta in (Dense(torch.ones(5)), Dense(torch.ones(2, 3, 3))):
        assert truncate(delta, 1) is delta


def test_the_benchmark_finds_both_routes_equal(tmp_path: Path) -> None:
    small = [
        "--tasks",
        "4",
        "--rows",
        "64",
        "--columns",
        "96",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "found.json"),
    ]
    found = runpy.run_path(str(BENCHMARK))["main"](small)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    for spectrum in ("gap", "no gap"):
        figures = found[f"cpu, {spectrum}"]
        assert figures["relative_difference"] < TOLERANCE and figures["energy_difference"] < 1e-3
        assert figures["ratio"]["wall"] > 0 and sum(figures["share_of_time"].values()) == pytest.approx(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_merge_stays_on_the_device_of_the_changes() -> None:
    matrices = tasks(20, (FAST_MIN_SIDE, 640))
    merged = tsv_merge(changes([matrix.cuda() for matrix in matrices]))
    assert isinstance(merged, LowRank) and merged.left.is_cuda and merged.right.is_cuda
    assert relative(dense(merged).cpu(), reference(matrices)) < TOLERANCE
