"""Shared and unique components against dense n x n projections, and what each pool and subspace promises."""

from __future__ import annotations

import functools
import itertools
import json
import math
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles.matrices import EPS, Largest, gaussian, is_orthonormal, orthonormal, relative
from tvbases_hf.algebra.delta import Delta, Dense, LowRank, dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods import devec as shared_module
from tvbases_hf.methods.devec import (
    MIN_SIDE,
    Options,
    Pool,
    Side,
    Subspace,
    chance_limit,
    chance_share,
    column_space,
    decompose,
    project,
    shared_subspace,
    spectrum,
    square_norm,
    weighted_mean,
)

SUBSPACES: tuple[Subspace, ...] = get_args(get_args(Subspace)[0])
POOLS: tuple[Pool, ...] = get_args(get_args(Pool)[0])
SIDES: tuple[Side, ...] = get_args(get_args(Side)[0])
BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "bench_shared.py"
N, M, R = 60, 45, 8
ROUNDING = 30 * EPS


def projector(space: Tensor) -> Tensor:
    """U U^T, n x n (equation 7)."""
    return space @ space.T


def chained(spaces: Sequence[Tensor]) -> Tensor:
    """P_1 P_2 ... P_k, n x n (equation 8)."""
    return functools.reduce(torch.matmul, [projector(space) for space in spaces])


def column_projector(matrix: Tensor, rank: int) -> Tensor:
    return projector(torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :rank])


def near(seed: int, count: int, rows: int = N, rank: int = R, spread: float = 0.3) -> list[Tensor]:
    """Spaces at moderate angles to each other, so that every degree of sharing occurs."""
    common = orthonormal(seed, rows, rank)
    degrees = spread * torch.linspace(0.2, 2, rank, dtype=torch.float64)
    noise = [orthonormal(seed + i + 1, rows, rank) for i in range(count)]
    return [torch.linalg.qr(common + degrees * part).Q for part in noise]


def planted(
    seed: int, count: int, common: int = 3, own: int = 5, rows: int = N, columns: int = M, noise: float = 0.0
) -> tuple[Tensor, list[LowRank]]:
    """The shared directions, and changes whose column spaces are those plus some of their own."""
    basis = orthonormal(seed, rows, common + count * own)
    deltas = []
    for i in range(count):
        mine = torch.cat([basis[:, :common], basis[:, common + i * own : common + (i + 1) * own]], 1)
        mine = mine + noise * gaussian(seed + 3 * i + 1, rows, common + own)
        left = mine @ gaussian(seed + 3 * i + 2, common + own, common + own)
        deltas.append(LowRank(left.float(), orthonormal(i, columns, common + own).T.float()))
    return basis[:, :common], deltas


def in_form(deltas: Sequence[LowRank], form: str) -> tuple[list[Delta], Options]:
    """The same changes dense, mixed or as they are, and options that give them the same column spaces."""
    stored: list[Delta] = [Dense(dense(delta).float()) for delta in deltas]
    chosen = {"dense": stored, "low-rank": list(deltas), "mixed": [deltas[0], *stored[1:]]}[form]
    return chosen, Options(rank=deltas[0].rank)


def angle(a: Tensor, b: Tensor) -> float:
    """Largest principal angle between two spaces of equal dimension, in degrees."""
    return math.degrees(math.asin(min(1.0, float(torch.linalg.matrix_norm(projector(a) - projector(b), 2)))))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.svdvals(a.double().T @ b.double())


# The small matrix instead of n x n


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_small_matrix_has_the_eigenvalues_of_the_chain(count: int) -> None:
    spaces = near(0, count)
    expected = torch.linalg.eigvals(chained(spaces))
    expected = expected[expected.abs().argsort(descending=True)[:R]].real.sort().values
    found = spectrum(spaces, "chain")[0].sort().values
    assert torch.allclose(found, expected, atol=1e-10)
    assert expected.max() - expected.min() > 0.3  # degrees of all kinds


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_u1_y_are_eigenvectors_of_the_chain(count: int) -> None:
    spaces = near(0, count)
    chain = chained(spaces)
    values, vectors = spectrum(spaces, "chain")
    core = spaces[0].T @ chain @ spaces[0]
    real = [value for value in torch.linalg.eigvals(core) if abs(value.imag) < 1e-12]
    assert len(real) >= 2
    for value in real:
        index = int((values - value.real).abs().argmin())
        vector = vectors[:, index]
        assert (chain @ vector - value.real * vector).norm() < 1e-10 * vector.norm()


def test_the_small_matrix_has_the_eigenvalues_and_eigenvectors_of_the_mean() -> None:
    spaces = near(3, 4)
    average = sum((projector(space) for space in spaces), torch.zeros(N, N).double()) / 4
    expected = ((4 * torch.linalg.eigvalsh(average) - 1) / 3).clamp_min(0).square().sort(descending=True).values[:R]
    values, vectors = spectrum(spaces, "mean")
    top = values.argsort(descending=True)[:R]
    assert torch.allclose(values[top], expected, atol=1e-10)
    assert is_orthonormal(vectors[:, top], 1e-10)
    eigenvalues = (1 + 3 * values[top].sqrt()) / 4
    assert (average @ vectors[:, top] - vectors[:, top] * eigenvalues).norm() < 1e-10


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_two_tasks_have_the_squared_cosines_of_their_principal_angles(subspace: Subspace) -> None:
    a, b = near(4, 2)
    expected = cosines(a, b).square()
    degrees = spectrum([a, b], subspace)[0].sort(descending=True).values[:R]
    assert torch.allclose(degrees, expected, atol=1e-10)
    for threshold in (0.2, 0.5, 0.85, 0.99):
        found = shared_subspace([a, b], threshold, subspace)
        assert found.shape == (N, int((expected > threshold).sum()))
        assert is_orthonormal(found, 1e-10)
        if subspace != "mean":
            left, values, _ = torch.linalg.svd(a.T @ b)
            chosen = a @ left[:, values.square() > threshold]
            assert relative(projector(found), projector(chosen)) < 1e-10


def test_the_mean_takes_the_directions_in_between() -> None:
    a, b = near(5, 2)
    chain, mean = (shared_subspace([a, b], 0.5, subspace) for subspace in ("chain", "mean"))
    assert chain.shape == mean.shape and chain.shape[1] > 1
    half = [math.degrees(0.5 * math.acos(float(c))) for c in cosines(a, b)[: chain.shape[1]]]
    assert angle(chain, mean) == pytest.approx(max(half), rel=1e-6)


def test_conjugate_eigenvectors_stand_for_the_plane_they_span() -> None:
    """Three spaces that turn a plane a little: P_1 P_2 P_3 has complex eigenvalues with a real part near 1."""
    spaces = [torch.eye(N, 2, dtype=torch.float64)]
    for i, turn in enumerate((0.25, 0.5)):
        # Rows 2 to 5 hold what leaves the plane; the second space leans by other directions than the third.
        lean = torch.zeros(N, 2, dtype=torch.float64)
        lean[2, 0], lean[3, 1] = 1.0, 1.0
        rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        spaces.append(torch.linalg.qr(spaces[0] + turn * (lean if i == 0 else lean @ rotation)).Q)
    chain = chained(spaces)
    complex_pair = torch.linalg.eigvals(spaces[0].T @ chain @ spaces[0])
    assert complex_pair.imag.abs().min() > 0.01 and complex_pair.real.min() > 0.5
    found = shared_subspace(spaces, 0.5, "chain")
    assert found.shape == (N, 2)
    assert (chain @ found - projector(found) @ chain @ found).norm() < 1e-12


@settings(deadline=None, max_examples=25)
@given(count=st.integers(2, 5), threshold=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_the_shared_subspace_is_invariant_under_the_chain(count: int, threshold: float, seed: int) -> None:
    spaces = near(seed, count)
    found = shared_subspace(spaces, threshold, "chain")
    moved = chained(spaces) @ found
    assert is_orthonormal(found, 1e-8)
    assert (moved - projector(found) @ moved).norm() < 1e-8
    assert (found - projector(spaces[0]) @ found).norm() < 1e-10  # and lies in the first space


# Recovery


@pytest.mark.parametrize("subspace", ["chain", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_planted_directions_are_recovered_exactly_without_noise(
    count: int, dtype: torch.dtype, subspace: Subspace
) -> None:
    """The toy experiment of figure 8a: 100 directions, eigenvalue 1 a hundredfold."""
    common = orthonormal(0, 400, 100)
    spaces = []
    for i in range(count):
        own = gaussian(i + 20, 400, 30)
        spaces.append(torch.linalg.qr(torch.cat([common @ orthonormal(i + 1, 100, 100), own], 1)).Q.to(dtype))
    found = shared_subspace(spaces, 0.85, subspace)
    values = spectrum(spaces, subspace)[0]
    assert found.shape == (400, 100) and found.dtype == dtype
    # Eigenvectors of a multiple eigenvalue of an unsymmetric product may nearly depend on each other: half the digits.
    digits = EPS if dtype == torch.float32 else 1e-16 if count == 2 or subspace == "mean" else 1e-10
    assert relative(projector(found.double()), projector(common)) < 100 * digits
    assert int((values > 0.999).sum()) == 100 and int(((values > 0.85) & (values < 0.999)).sum()) == 0


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("noise", [0.0, 0.005, 0.01, 0.02, 0.03])
def test_planted_directions_are_recovered_up_to_the_angle_of_the_noise(noise: float, subspace: Subspace) -> None:
    """Figure 8b: noise of size sigma tilts a unit column by about atan(sigma sqrt(n)), here up to 27 degrees."""
    rows, common = 300, orthonormal(6, 300, 10)
    spaces = []
    for i in range(2):
        own = orthonormal(i + 7, rows, 10)
        matrix = torch.cat([common, own - projector(common) @ own], 1) + noise * gaussian(i + 9, rows, 20)
        spaces.append(torch.linalg.qr(matrix).Q)
    found = shared_subspace(spaces, 0.3, subspace)
    recovered = float(cosines(common, found).clamp_max(1).acos().rad2deg().mean())
    tilt = math.degrees(math.atan(noise * math.sqrt(rows)))
    assert found.shape[1] == 10
    assert 0.5 * tilt <= recovered <= 1.1 * tilt + 1e-5  # the mean averages two tilts, the chain keeps the first


def test_nothing_is_shared_by_independent_low_rank_changes() -> None:
    deltas = [LowRank(gaussian(i, 400, 8).float(), gaussian(i + 9, 8, 300).float()) for i in range(3)]
    for subspace in ("chain", "mean"):
        split = decompose(deltas, Options(subspace=subspace))
        assert split.shared_dims == (0, 0, 0) and split.ranks == (8, 8, 8)
        assert square_norm(split.combined) == 0
        assert all(torch.equal(dense(part), dense(delta)) for part, delta in zip(split.unique, deltas, strict=True))


# Decomposition


@pytest.mark.parametrize("form", ["dense", "low-rank", "mixed"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_shared_and_unique_add_up_to_the_change(subspace: Subspace, pool: Pool, side: Side, form: str) -> None:
    count = 2 if subspace == "angles" else 3
    if side == "column":
        _, factors = planted(10, count)
    else:
        factors = [LowRank(delta.right.T, delta.left.T) for delta in planted(10, count, rows=M, columns=N)[1]]
    deltas, options = in_form(factors, form)
    split = decompose(deltas, Options(0.85, subspace, pool, side, options.rank))
    for index, delta in enumerate(deltas):
        assert relative(dense(split.shared[index]) + dense(split.unique[index]), dense(delta)) < ROUNDING
        assert split.shared[index].shape == split.unique[index].shape == delta.shape
    energies = [square_norm(part) for part in split.shared]
    if pool == "pairs":
        assert not any(energies) and len(split.pairwise) == math.comb(count, 2)
        assert all(square_norm(part) > 1 for part in split.pairwise)
    else:
        assert all(energy > 0.05 * square_norm(delta) for energy, delta in zip(energies, deltas, strict=True))
        assert all(square_norm(part) > 1 for part in split.unique)
    assert split.ranks == (8,) * count and min(split.shared_dims) >= 3


@pytest.mark.parametrize("form", ["dense", "low-rank", "mixed"])
@pytest.mark.parametrize("count", [2, 3])
def test_joint_components_equal_the_dense_formulas(count: int, form: str) -> None:
    """Equations 6 to 14 with n x n projections."""
    _, factors = planted(11, count, noise=0.02)
    deltas, options = in_form(factors, form)
    split = decompose(deltas, options)
    exact = [dense(delta) for delta in deltas]
    chain = functools.reduce(torch.matmul, [column_projector(matrix, 8) for matrix in exact])
    values, vectors = torch.linalg.eig(chain)
    chosen = values.real > 0.85
    shared_projector = projector(torch.linalg.qr(vectors[:, chosen].real).Q)
    assert int(chosen.sum()) == split.shared_dims[0] == 3
    parts = [shared_projector @ matrix for matrix in exact]
    norms = [part.norm() for part in parts]
    combined = sum((n * p for n, p in zip(norms, parts, strict=True)), torch.zeros(1)) / sum(norms)
    for index, matrix in enumerate(exact):
        assert relative(dense(split.shared[index]), parts[index]) < 1e-5
        assert relative(dense(split.unique[index]), matrix - parts[index]) < 1e-5
    assert relative(dense(split.combined), combined) < 1e-5
    assert relative(sum(parts, torch.zeros(1)) / count, combined) > 1e-3  # the plain mean is another


@pytest.mark.parametrize("form", ["dense", "low-rank"])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_unique_components_are_orthogonal_to_the_shared_subspace(subspace: Subspace, form: str) -> None:
    deltas, options = in_form(planted(12, 2, noise=0.05)[1], form)
    split = decompose(deltas, Options(0.5, subspace, rank=options.rank))
    common = shared_subspace([column_space(delta, options.rank) for delta in deltas], 0.5, subspace)
    assert common.shape[1] >= 3
    for delta, unique, part in zip(deltas, split.unique, split.shared, strict=True):
        inside = common.double().T @ dense(unique)
        assert inside.norm() < ROUNDING * dense(delta).norm()
        assert (common.double().T @ dense(delta)).norm() > 0.1 * dense(delta).norm()
        assert relative(projector(common.double()) @ dense(part), dense(part)) < ROUNDING


@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_the_row_side_is_the_column_side_of_the_transposes(form: str) -> None:
    deltas, options = in_form(planted(13, 3)[1], form)
    flipped: list[Delta] = [
        LowRank(d.right.T, d.left.T) if isinstance(d, LowRank) else Dense(dense(d, torch.float32).T) for d in deltas
    ]
    for pool in POOLS:
        rows = decompose(flipped, Options(pool=pool, side="row", rank=options.rank))
        columns = decompose(deltas, Options(pool=pool, rank=options.rank))
        pairs = [*rows.shared, *rows.unique, rows.combined, *rows.pairwise]
        expected = [*columns.shared, *columns.unique, columns.combined, *columns.pairwise]
        for part, other in zip(pairs, expected, strict=True):
            assert torch.allclose(dense(part).T, dense(other), atol=1e-4)
        assert rows.shared_dims == columns.shared_dims


def test_differences_of_stored_checkpoints_are_decomposed() -> None:
    """As mergekit and the checkpoints give them: tuned minus base, both in bfloat16."""
    base = gaussian(14, N, M).bfloat16()
    tuned = [(base.double() + dense(delta)).bfloat16() for delta in planted(15, 2)[1]]
    deltas = [Dense(tensor, base) for tensor in tuned]
    for side in SIDES:
        split = decompose(deltas, Options(side=side, rank=8))
        for delta, part, unique in zip(deltas, split.shared, split.unique, strict=True):
            assert relative(dense(part) + dense(unique), dense(delta)) < ROUNDING
    assert decompose(deltas, Options(rank=8)).shared_dims[0] == 3


# Order of the tasks


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_the_mean_does_not_depend_on_the_order_of_the_tasks(order: list[int], seed: int) -> None:
    spaces = near(seed, 4, spread=0.2)
    values = spectrum(spaces, "mean")[0]
    threshold = float(values[values.argsort(descending=True)[2:4]].mean())  # between two degrees
    found, again = (shared_subspace(part, threshold, "mean") for part in (spaces, [spaces[i] for i in order]))
    assert found.shape == again.shape == (N, 3)
    assert relative(projector(again), projector(found)) < 1e-6


def test_the_chain_depends_on_the_order_of_more_than_two_tasks_and_says_so() -> None:
    spaces = near(16, 4)
    found = {
        order: shared_subspace([spaces[i] for i in order], 0.5, "chain") for order in itertools.permutations(range(4))
    }
    first = found[(0, 1, 2, 3)]
    assert angle(first, found[(0, 2, 1, 3)]) > 1 or first.shape != found[(0, 2, 1, 3)].shape
    eigenvalues = [spectrum([spaces[i] for i in order], "chain")[0].sort().values for order in found]
    assert max((values - eigenvalues[0]).abs().max() for values in eigenvalues) > 1e-3
    assert "depend on the order" in (shared_subspace.__doc__ or "")


def test_directions_shared_exactly_do_not_depend_on_the_order() -> None:
    common, deltas = planted(17, 4)
    spaces = [column_space(delta, 8) for delta in deltas]
    for order in itertools.permutations(range(4)):
        found = shared_subspace([spaces[i] for i in order], 0.85, "chain")
        assert relative(projector(found.double()), projector(common)) < 1e-5


# Pools


@pytest.mark.parametrize("subspace", ["chain", "angles"])
@pytest.mark.parametrize("threshold", [0.3, 0.85])
def test_iterative_removal_leaves_nothing_shared_above_the_threshold(threshold: float, subspace: Subspace) -> None:
    """With every member of the pool: removing a later one's share only shrinks the target's space."""
    target = orthonormal(18, N, 10)
    deltas = [LowRank(target.float(), gaussian(19, 10, M).float())]
    for i in range(3):  # each leans towards other directions of the target, some of them the same
        mixed = target[:, 2 * i : 2 * i + 4] + 0.25 * orthonormal(20 + i, N, 4) * torch.linspace(0, 3, 4).double()
        deltas.append(LowRank(mixed.float(), gaussian(30 + i, 4, M).float()))
    spaces = [column_space(delta, 1) for delta in deltas]
    before = [float(cosines(spaces[0], space).max() ** 2) for space in spaces[1:]]
    split = decompose(deltas, Options(threshold, subspace, "iterative"), targets=[0])
    left = column_space(split.unique[0], 1)
    after = [float(cosines(left, space).max() ** 2) for space in spaces[1:]]
    assert min(before) > threshold + 0.01 and max(after) <= threshold + 1e-5
    assert left.shape[1] == 10 - split.shared_dims[0] and 0 < split.shared_dims[0] < 10
    # The chain of all at once would have left shares of single members in place.
    joint = decompose(deltas, Options(threshold, "chain", "joint"))
    remaining = column_space(joint.unique[0], 1)
    assert max(float(cosines(remaining, space).max() ** 2) for space in spaces[1:]) > threshold + 0.01


def test_iterative_shared_part_is_what_was_removed_one_after_another() -> None:
    _, deltas = planted(21, 4, noise=0.05)
    spaces = [column_space(delta, 8).double() for delta in deltas]
    current, space = dense(deltas[1]), spaces[1]
    for other in (0, 2, 3):
        left, values, _ = torch.linalg.svd(space.T @ spaces[other])
        common = space @ left[:, torch.nn.functional.pad(values, (0, space.shape[1] - len(values))) ** 2 > 0.6]
        current = current - projector(common) @ current
        rest = torch.linalg.svd(space - projector(common) @ space, full_matrices=False)
        space = rest[0][:, rest[1] > 0.5]
    split = decompose(deltas, Options(0.6, pool="iterative"))
    assert relative(dense(split.unique[1]), current) < 1e-5
    assert split.shared_dims[1] == 8 - space.shape[1] > 0


def test_only_the_targets_are_decomposed_by_the_iterative_pool() -> None:
    _, deltas = planted(22, 4)
    split = decompose(deltas, Options(pool="iterative"), targets=[2])
    everyone = decompose(deltas, Options(pool="iterative"))
    for index in (0, 1, 3):
        assert split.unique[index] is deltas[index] and split.shared_dims[index] == 0
        assert square_norm(split.shared[index]) == 0 < square_norm(everyone.shared[index])
    assert torch.equal(dense(split.unique[2]), dense(everyone.unique[2]))
    assert relative(dense(split.combined), dense(split.shared[2])) < ROUNDING


def test_pairs_hold_the_weighted_shared_change_of_each_pair() -> None:
    _, deltas = planted(23, 3)
    extra = gaussian(24, N, 2).float()  # something that the first two share, and not the third
    deltas = [
        LowRank(torch.cat([d.left, extra], 1), torch.cat([d.right, gaussian(25 + i, 2, M).float()], 0)) if i < 2 else d
        for i, d in enumerate(deltas)
    ]
    split = decompose(deltas, Options(pool="pairs"))
    for part, (i, j) in zip(split.pairwise, itertools.combinations(range(3), 2), strict=True):
        two = decompose([deltas[i], deltas[j]], Options())
        assert relative(dense(part), dense(two.combined)) < ROUNDING
    assert split.shared_dims == (5, 5, 3)
    assert all(unique is delta for unique, delta in zip(split.unique, deltas, strict=True))


@pytest.mark.parametrize("shape", [(MIN_SIDE - 1, 40), (40, MIN_SIDE - 1), (30,), (4, 20, 20), (1,)])
@pytest.mark.parametrize("pool", POOLS)
def test_small_matrices_and_other_tensors_are_unique(shape: tuple[int, ...], pool: Pool) -> None:
    deltas = [Dense(torch.ones(shape)) for _ in range(3)]
    split = decompose(deltas, Options(pool=pool))
    assert all(unique is delta for unique, delta in zip(split.unique, deltas, strict=True))
    assert all(not dense(part).any() and part.shape == shape for part in (*split.shared, split.combined))
    assert split.ranks == split.shared_dims == (0, 0, 0)
    assert len(split.pairwise) == (3 if pool == "pairs" else 0)
    assert all(square_norm(part) == 0 for part in split.pairwise)


def test_one_task_is_unique() -> None:
    _, deltas = planted(26, 1)
    split = decompose(deltas)
    assert split.unique[0] is deltas[0] and square_norm(split.shared[0]) == 0


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_a_zero_change_shares_nothing(pool: Pool, form: str) -> None:
    _, factors = planted(27, 2)
    deltas, options = in_form([*factors, LowRank(torch.zeros(N, 8), torch.zeros(8, M))], form)
    split = decompose(deltas, Options(pool=pool, rank=options.rank))
    assert split.ranks == (8, 8, 0)
    assert square_norm(split.shared[2]) == 0 and square_norm(split.unique[2]) == 0
    assert all(dense(part).isfinite().all() for part in (*split.shared, *split.unique, split.combined))
    nothing = decompose([deltas[2]] * 2, Options(pool=pool, rank=options.rank))
    assert square_norm(nothing.combined) == 0 and nothing.shared_dims == (0, 0)


@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_copies_share_everything(form: str) -> None:
    delta = in_form(planted(28, 1)[1], form)[0][0]
    for subspace in SUBSPACES:
        split = decompose([delta, delta], Options(subspace=subspace, rank=8))
        assert square_norm(split.unique[0]) < ROUNDING**2 * square_norm(delta)
        assert relative(dense(split.combined), dense(delta)) < ROUNDING


# Cost


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("subspace", ["chain", "mean"])
def test_low_rank_changes_are_decomposed_without_a_matrix_of_full_size(subspace: Subspace, pool: Pool) -> None:
    rows, columns = 1200, 900
    _, deltas = planted(29, 3, rows=rows, columns=columns)
    with Largest() as seen:
        split = decompose(deltas, Options(subspace=subspace, pool=pool))
        square_norm(split.combined)
    assert seen.numbers <= 4 * 8 * rows
    assert all(isinstance(part, LowRank) for part in (*split.shared, *split.unique, split.combined))


def test_a_low_rank_change_keeps_its_rank() -> None:
    _, deltas = planted(30, 3)
    split = decompose(deltas)
    assert [part.rank for part in split.unique if isinstance(part, LowRank)] == [8, 8, 8]
    assert [part.rank for part in (*split.shared, split.combined) if isinstance(part, LowRank)] == [3, 3, 3, 3]


# Helpers


def test_project_is_the_dense_projection() -> None:
    space = orthonormal(31, N, 4)
    for delta in (LowRank(gaussian(32, N, 5), gaussian(33, 5, M)), Dense(gaussian(34, N, M))):
        assert relative(dense(project(space, delta)), projector(space) @ dense(delta)) < 1e-13


@pytest.mark.parametrize("form", ["same subspace", "low-rank", "dense"])
def test_weighted_mean_weighs_by_the_norms(form: str) -> None:
    """Equation 14."""
    left = gaussian(35, N, 3)
    parts: list[Delta] = [LowRank(left, (i + 1) * gaussian(36 + i, 3, M)) for i in range(3)]
    if form != "same subspace":
        parts = [LowRank(gaussian(39 + i, N, 3), (i + 1) * gaussian(36 + i, 3, M)) for i in range(3)]
    if form == "dense":
        parts = [Dense(dense(part)) for part in parts]
    exact = [dense(part) for part in parts]
    norms = torch.stack([part.norm() for part in exact])
    expected = sum((n * p for n, p in zip(norms, exact, strict=True)), torch.zeros(1)) / norms.sum()
    assert relative(dense(weighted_mean(parts)), expected) < 1e-12


def test_square_norm_is_that_of_the_dense_change() -> None:
    factors = LowRank(gaussian(42, N, 5), gaussian(43, 5, M))
    assert square_norm(factors) == pytest.approx(float(dense(factors).square().sum()), rel=1e-12)
    assert square_norm(Dense(dense(factors))) == pytest.approx(square_norm(factors), rel=1e-12)


# Sharing by chance


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.85, 0.99, 1.0])
def test_chance_limit_is_where_4a_times_1_minus_a_reaches_the_threshold(threshold: float) -> None:
    limit = chance_limit(threshold)
    assert 4 * limit * (1 - limit) == pytest.approx(threshold)
    assert 0 < limit <= 0.5


def test_published_chance_limits() -> None:
    assert chance_limit(0.85) == pytest.approx(0.306, abs=1e-3)
    assert chance_limit(0.5) == pytest.approx(0.146, abs=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_random_subspaces_have_the_top_squared_cosine_of_the_limit(share: float) -> None:
    rows = 600
    spaces = [orthonormal(44 + i, rows, round(share * rows)) for i in range(2)]
    assert float(cosines(*spaces)[0] ** 2) == pytest.approx(4 * share * (1 - share), abs=0.03)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("subspace", ["chain", "mean"])
@pytest.mark.parametrize("share", [0.2, 0.35, 0.45, 0.6])
def test_chance_share_agrees_with_a_simulation_at_full_size(share: float, subspace: Subspace, count: int) -> None:
    rows, rank = 600, round(600 * share)
    spaces = [orthonormal(46 + i, rows, rank) for i in range(count)]
    simulated = shared_subspace(spaces, 0.85, subspace).shape[1] / rank
    assert chance_share(rows, (rank,) * count, 0.85, subspace) == pytest.approx(simulated, abs=0.03)
    assert share > 0.35 or simulated < 0.15
    assert share < 0.6 or count > 2 or simulated > 0.4


def test_nothing_is_shared_by_chance_below_the_limit_and_something_above() -> None:
    limit = chance_limit(0.85)
    assert chance_share(4096, (round(0.85 * limit * 4096),) * 2, 0.85) == 0
    assert chance_share(4096, (round(1.2 * limit * 4096),) * 2, 0.85) > 0
    assert chance_share(4096, (16, 16), 0.85) == 0


# Errors


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ParameterError, match=r"^threshold of .*; the paper: 0\.85.*, above 0 and at most 1; got "):
        Options(threshold=threshold)


@pytest.mark.parametrize(("name", "known"), [("subspace", SUBSPACES), ("pool", POOLS), ("side", SIDES)])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str, known: tuple[str, ...]) -> None:
    with pytest.raises(ParameterError, match=f"^{name} of a decomposition must be {' or '.join(known)}; got 'foo'$"):
        replace(Options(), **{name: "foo"})
    for value in known:
        assert getattr(replace(Options(), **{name: value}), name) == value


@pytest.mark.parametrize("rank", [0, "0", -3, "energy:2", "foo"])
def test_a_bad_rank_is_refused_before_any_work(rank: str | float) -> None:
    with pytest.raises(ParameterError, match="is not a rank rule"):
        Options(rank=rank)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("whole", [(0, 1), (0,), (1,)])
def test_full_rank_changes_are_refused_instead_of_shared_altogether(whole: tuple[int, ...], pool: Pool) -> None:
    deltas: list[Delta] = list(planted(50, 2, rows=20)[1])
    for index in whole:
        deltas[index] = Dense(gaussian(51 + index, 20, M).float())
    with pytest.raises(ParameterError, match=rf"^{len(whole)} of 2 tasks \(first: number {whole[0]}\) span all 20 "):
        decompose(deltas, Options(pool=pool, rank="energy:1"))
    split = decompose(deltas, Options(pool=pool, rank="fraction:0.2"))
    assert max(split.shared_dims) < 8


def test_adapters_as_large_as_the_matrix_are_refused_on_that_side_only() -> None:
    deltas = [LowRank(gaussian(i, 20, 32).float(), gaussian(i + 9, 32, 200).float()) for i in range(2)]
    with pytest.raises(ParameterError, match="compare the other side"):
        decompose(deltas)
    assert decompose(deltas, Options(side="row")).ranks == (20, 20)


@pytest.mark.parametrize("targets", [[3], [-1], [0, 7]])
def test_targets_that_are_no_tasks_are_refused(targets: list[int]) -> None:
    with pytest.raises(ParameterError, match="must be numbers of tasks, 0 to 2"):
        decompose(planted(52, 3)[1], Options(pool="iterative"), targets)


def test_principal_angles_are_for_two_tasks() -> None:
    _, deltas = planted(53, 3)
    with pytest.raises(ParameterError, match="angles is defined for two tasks, not 3; use chain or mean"):
        decompose(deltas, Options(subspace="angles"))
    for pool in ("iterative", "pairs"):  # which take two at a time
        assert min(decompose(deltas, Options(subspace="angles", pool=pool)).shared_dims) == 3


def test_zeros_lie_on_the_device_of_the_change() -> None:
    """A merge on a GPU adds them to what does; the meta device stands for one here."""
    for delta in (Dense(torch.zeros(4, 5, device="meta")), Dense(torch.zeros(5, device="meta"))):
        zero = shared_module._zero_like(delta)
        assert all(part.device.type == "meta" for part in vars(zero).values() if part is not None)
    low = LowRank(torch.zeros(4, 2, device="meta"), torch.zeros(2, 5, device="meta"))
    zero = shared_module._zero_like(low)
    assert isinstance(zero, LowRank) and zero.left.device.type == zero.right.device.type == "meta"


def test_the_benchmark_finds_both_routes_equal_and_draws_the_toy_experiment(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "toy.png")]
    found = runpy.run_path(str(BENCHMARK))["main"](["--side", "64", "--rank", "4", "--runs", "2", *files])
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert all(row["relative_difference"] < 1e-4 and row["ratio"] > 0 for row in found["routes"].values())
    for angles in found["toy"]["angle"].values():
        assert angles[0] < 1e-3 and angles == sorted(angles)  # exact without noise, and worse with more of it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pool", POOLS)
def test_components_stay_on_the_device_of_the_changes(pool: Pool) -> None:
    _, factors = planted(54, 3)
    moved = [LowRank(delta.left.cuda(), delta.right.cuda()) for delta in factors]
    for deltas in (moved, [Dense(dense(delta, torch.float32)) for delta in moved]):
        for subspace in ("chain", "mean"):
            for targets in (None, [1]):
                split = decompose(deltas, Options(pool=pool, subspace=subspace, rank=8), targets)
                expected = decompose(factors, Options(pool=pool, subspace=subspace), targets)
                others = (*expected.unique, expected.combined)
                for part, other in zip((*split.unique, split.combined), others, strict=True):
                    assert dense(part).is_cuda and torch.allclose(dense(part).cpu(), dense(other), atol=1e-4)
