"""Adapters' changes in joint coordinates and over shared rows, against dense float64 linear algebra."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from oracles.matrices import Largest, gaussian, is_orthonormal
from tvbases_hf.algebra.delta import LowRank, dense
from tvbases_hf.basis.adapters.choice import sharing, side_by_side
from tvbases_hf.basis.adapters.codec import Spec, restored, store
from tvbases_hf.basis.adapters.cores import MAX_COEFFICIENT, Cores, share_rows, well_conditioned_rows, widths

ROWS, COLUMNS = 23, 17
EPS = torch.finfo(torch.float64).eps
# Sums of some thousand products of numbers of order 1, as a multiple of their norm.
TOLERANCE = 1e3 * EPS


def related(seed: int, ranks: Sequence[int] = (4, 4, 3, 4), near: float = 0.2) -> list[LowRank]:
    """Changes whose right factors stay near a common one, as those of runs from one seed do."""
    common = gaussian(seed, max(ranks), COLUMNS)
    return [
        LowRank(gaussian(seed + 1 + t, ROWS, rank), common[:rank] + near * gaussian(seed + 50 + t, rank, COLUMNS))
        for t, rank in enumerate(ranks)
    ]


def restricted(changes: Sequence[Tensor], weights: Tensor, width: int, count: int) -> list[Tensor]:
    """The dense oracle: project on the leading right singular vectors of the stacked changes, then truncate all."""
    stacked = torch.cat([weight.sqrt() * change for weight, change in zip(weights, changes, strict=True)])
    axes = torch.linalg.svd(stacked, full_matrices=False).Vh[:width]
    parts = [torch.linalg.svd(change @ axes.T @ axes, full_matrices=False) for change in changes]
    energies = torch.cat([weight * part.S.square() for weight, part in zip(weights, parts, strict=True)])
    smallest = energies.sort(descending=True).values[count - 1] * (1 - 1e-9)
    kept = [(weight * part.S.square() >= smallest) for weight, part in zip(weights, parts, strict=True)]
    return [part.U[:, keep] * part.S[keep] @ part.Vh[keep] for keep, part in zip(kept, parts, strict=True)]


def test_a_change_is_the_product_of_its_cores_with_orthonormal_factors() -> None:
    changes = related(0)
    cores = Cores.of(changes)
    assert is_orthonormal(cores.left, TOLERANCE) and is_orthonormal(cores.right, TOLERANCE)
    for change, outer, inner in zip(changes, cores.outs, cores.ins, strict=True):
        product = cores.left @ outer @ inner.T @ cores.right.T
        assert (product - dense(change)).norm() <= TOLERANCE * dense(change).norm()


def test_inner_products_in_joint_coordinates_are_those_of_the_dense_matrices() -> None:
    changes = [*related(1), LowRank(torch.zeros(ROWS, 0), torch.zeros(0, COLUMNS))]
    flat = torch.stack([dense(change).reshape(-1) for change in changes])
    assert (Cores.of(changes).gram() - flat @ flat.T).abs().max() <= TOLERANCE * flat.square().sum()


def test_row_spaces_overlap_by_the_mean_squared_cosine_of_their_angles() -> None:
    changes = related(2)
    spaces = [torch.linalg.qr(change.right.T).Q for change in changes]
    found = Cores.of(changes).overlap()
    for i, a in enumerate(spaces):
        for j, b in enumerate(spaces):
            expected = float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1])
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-10)


def test_components_of_a_combination_are_those_of_the_dense_sum() -> None:
    changes, shares = related(3), torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    cores = Cores.of(changes)
    found = cores.combined(shares)
    total = sum(float(share) * dense(change) for share, change in zip(shares, changes, strict=True))
    assert isinstance(total, Tensor)
    product = cores.left @ (found.U * found.S) @ (cores.right @ found.V).T
    assert (product - total).norm() <= TOLERANCE * total.norm()
    expected = torch.linalg.svdvals(total)[: found.rank]
    assert (found.S - expected).abs().max() <= TOLERANCE * expected[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("width", "count"), [(4, 15), (6, 10), (8, 8), (12, 13)])
def test_shared_factors_give_the_restricted_and_truncated_changes(side: str, width: int, count: int) -> None:
    changes, weights = related(4), torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    cores = Cores.of(changes) if side == "right" else Cores.of(changes).transposed()
    shared = share_rows(cores, weights, width, count)
    spec = Spec("x", "linear", [], [ROWS, COLUMNS], list(shared.sizes), side, list(shared.pivots))
    ones = torch.ones(ROWS, dtype=torch.float64)
    found = [dense(part) for part in restored(store(shared, side, ones, torch.float64), spec, ones)]
    oriented = [dense(change) if side == "right" else dense(change).T for change in changes]
    for part, expected in zip(found, restricted(oriented, weights, width, count), strict=True):
        expected = expected if side == "right" else expected.T
        assert (part - expected).norm() <= 100 * TOLERANCE * expected.norm()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_stock_factors_multiply_to_the_sum_and_nothing_is_stored_twice(side: str) -> None:
    changes, weights = related(5), torch.ones(4, dtype=torch.float64)
    cores = Cores.of(changes) if side == "right" else Cores.of(changes).transposed()
    shared = share_rows(cores, weights, 6, 12)
    spec = Spec("x", "linear", [], [ROWS, COLUMNS], list(shared.sizes), side, list(shared.pivots))
    factor = 1 + 0.1 * gaussian(1, ROWS)
    stored = store(shared, side, factor, torch.float64)
    total = sum(dense(part) for part in restored(stored, spec, factor))
    assert isinstance(total, Tensor)
    assert (factor[:, None] * stored.left @ stored.right - total).norm() <= TOLERANCE * total.norm()
    assert stored.rest is not None and stored.mix is not None
    numbers = sum(part.numel() for part in (stored.left, stored.right, stored.rest, stored.mix))
    outer, inner = (ROWS, COLUMNS) if side == "right" else (COLUMNS, ROWS)
    assert numbers == 12 * outer + 6 * inner + 6 * 6


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_menu_promises_exactly_what_the_encoding_saves_and_takes(side: str) -> None:
    changes, weights = related(6), torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    cores = Cores.of(changes) if side == "right" else Cores.of(changes).transposed()
    menu = sharing(cores, side, weights, 4)
    energy = float(sum(w * dense(c).square().sum() for w, c in zip(weights, changes, strict=True)))
    ones = torch.ones(ROWS, dtype=torch.float64)
    for index in range(0, len(menu.cost), 37):
        _, width, count = (int(number) for number in menu.entries[index])
        shared = share_rows(cores, weights, width, count)
        spec = Spec("x", "linear", [], [ROWS, COLUMNS], list(shared.sizes), side, list(shared.pivots))
        stored = store(shared, side, ones, torch.float32)
        parts = restored(store(shared, side, ones, torch.float64), spec, ones)
        lost = sum(
            float(w * (dense(c) - dense(p)).square().sum()) for w, c, p in zip(weights, changes, parts, strict=True)
        )
        assert float(menu.gain[index]) == pytest.approx(energy - lost, abs=1e-9 * energy)
        numbers = [stored.left, stored.right, *stored.beside.values()]
        assert float(menu.cost[index]) == sum(part.nbytes for part in numbers)


def test_the_menu_of_truncation_is_the_sorted_spectrum() -> None:
    changes, weights = related(7), torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    menu = side_by_side(Cores.of(changes), torch.eye(4, dtype=torch.float64), weights, 2, False)
    energies = torch.cat([w * torch.linalg.svdvals(dense(c)).square() for w, c in zip(weights, changes, strict=True)])
    expected = energies.sort(descending=True).values[: sum(c.rank for c in changes)].cumsum(0)
    assert (menu.gain[1:] - expected).abs().max() <= TOLERANCE * expected[-1]
    assert menu.cost.tolist() == [2 * k * (ROWS + COLUMNS) for k in range(len(expected) + 1)]


def test_runs_near_one_right_factor_share_it_and_unrelated_ones_do_not() -> None:
    """What the menus are for: at the bytes of two thirds of the components sharing saves more, or it does not."""
    weights, identity = torch.ones(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    saved = []
    for near in (0.05, 100.0):
        cores = Cores.of(related(8, (4, 4, 4, 4), near))
        alone = side_by_side(cores, identity, weights, 4, False)
        shared = sharing(cores, "right", weights, 4).pareto()
        budget = float(alone.cost[10])
        within = shared.cost <= budget
        saved.append(float(shared.gain[within].max()) / float(alone.gain[10]))
    assert saved[0] > 1 > saved[1]


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_a_combination_of_the_chosen_ones_with_small_coefficients(seed: int) -> None:
    matrix = gaussian(seed, 30, 6) * gaussian(seed + 9, 30, 1).exp()
    chosen = well_conditioned_rows(matrix)
    assert chosen == sorted(set(chosen)) and len(chosen) == 6
    coefficients = torch.linalg.solve(matrix[chosen].T, matrix.T).T
    assert coefficients.abs().max() <= MAX_COEFFICIENT * (1 + TOLERANCE)
    assert (coefficients @ matrix[chosen] - matrix).norm() <= TOLERANCE * matrix.norm()


def test_as_many_rows_are_chosen_as_the_matrix_has_rank() -> None:
    matrix = gaussian(0, 20, 3) @ gaussian(1, 3, 8)
    assert len(well_conditioned_rows(matrix)) == 3
    assert well_conditioned_rows(torch.zeros(4, 3, dtype=torch.float64)) == []


def test_all_widths_are_tried_up_to_a_number_and_then_evenly_up_to_the_limit() -> None:
    assert widths(5) == [1, 2, 3, 4, 5]
    many = widths(500)
    assert many[0] == 1 and many[-1] == 500 and len(many) <= 33
    assert many == sorted(set(many))


def test_no_matrix_of_the_weights_size_is_ever_formed() -> None:
    rows, columns, rank = 300, 200, 2
    changes = [LowRank(gaussian(t, rows, rank), gaussian(t + 9, rank, columns)) for t in range(3)]
    with Largest() as largest:
        cores = Cores.of(changes)
        shared = share_rows(cores, torch.ones(3, dtype=torch.float64), 3, 5)
        sharing(cores, "right", torch.ones(3, dtype=torch.float64), 4)
    assert shared.rows.shape[1] == columns
    assert largest.numbers <= rows * 3 * rank  # of the stacked factors
