"""TSV-Merge of matrices that are tall and large, by blocks of their rows: the same as Algorithm 1, never whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from oracles.matrices import gaussian, relative, with_spectrum
from tvbases_hf.algebra import tall
from tvbases_hf.algebra.blocks import pieces
from tvbases_hf.algebra.delta import Dense, Images, LowRank, dense
from tvbases_hf.algebra.sums import scale, total
from tvbases_hf.methods import tsv
from tvbases_hf.methods.tsv import tsv_merge

SHAPE = (640, 32)
TOLERANCE = 1e-4  # as of the other routes: float32 vectors, amplified by the condition of their concatenation


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tall, "LARGE", 1)
    monkeypatch.setattr(tall, "BLOCK_NUMBERS", 100 * 32)  # does not divide the rows


def procrustes(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def reference(matrices: list[Tensor], rank: int, weights: list[float], orthogonalize: bool = True) -> Tensor:
    """Algorithm 1 in float64."""
    parts = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in matrices]
    left = torch.cat([U[:, :rank] for U, _, _ in parts], dim=1)
    right = torch.cat([V[:rank].T for _, _, V in parts], dim=1)
    values = torch.cat([w * S[:rank] for (_, S, _), w in zip(parts, weights, strict=True)])
    if orthogonalize:
        left, right = procrustes(left), procrustes(right)
    return left * values @ right.T


def stored(count: int, least: float = 0.1, seed: int = 0) -> tuple[list[Dense], list[Tensor]]:
    """Changes of one bfloat16 base, the last kept component ``least`` of the first, and the matrices that they are."""
    base = gaussian(99, *SHAPE).to(torch.bfloat16)
    rank = SHAPE[1] // count
    values = torch.logspace(0, 0, SHAPE[1])
    values[:rank] = torch.linspace(1, least, rank)
    values[rank:] = 0.3 * least
    common = with_spectrum(seed + 1000, *SHAPE, values)
    matrices = [with_spectrum(seed + 10 * k, *SHAPE, values) + 0.1 * least * common for k in range(count)]
    deltas = [Dense((base.float() + matrix.float()), base) for matrix in matrices]
    return deltas, [dense(delta) for delta in deltas]


@pytest.mark.parametrize("orthogonalize", [True, False])
@pytest.mark.parametrize("count", [2, 4])
def test_merge_equals_the_dense_reference(count: int, orthogonalize: bool) -> None:
    deltas, matrices = stored(count)
    weights = [1.0, -0.5, 0.3, 2.0][:count]
    merged = tsv_merge(deltas, weights, orthogonalize=orthogonalize)
    expected = reference(matrices, SHAPE[1] // count, weights, orthogonalize)
    assert isinstance(merged, Images)
    assert relative(dense(merged), expected) < TOLERANCE
    assert relative(sum(matrices, torch.zeros(SHAPE)), expected) > 0.1


def test_it_equals_the_route_that_holds_matrices_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, _ = stored(4)
    by_rows = tsv_merge(deltas)
    monkeypatch.setattr(tall, "TALL", 1000)
    whole = tsv_merge(deltas)
    assert isinstance(by_rows, Images) and isinstance(whole, LowRank)
    assert relative(dense(by_rows), dense(whole)) < TOLERANCE


def test_small_components_are_found_by_float64_products(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, matrices = stored(4, least=0.0015)
    expected = reference(matrices, 8, [1.0] * 4)
    merged = tsv_merge(deltas)
    error = relative(dense(merged), expected)
    assert isinstance(merged, Images) and error < TOLERANCE
    monkeypatch.setattr(tall, "KNOWN", {torch.float32: 0.0})
    assert relative(dense(tsv_merge(deltas)), expected) > 3 * error


def test_components_that_squaring_drowns_are_left_to_the_other_route() -> None:
    deltas, matrices = stored(4, least=2e-4)
    merged = tsv_merge(deltas)
    assert isinstance(merged, LowRank)
    assert relative(dense(merged), reference(matrices, 8, [1.0] * 4)) < 10 * TOLERANCE


def test_a_task_and_its_copy_give_the_task_and_no_change_none() -> None:
    (delta,), (matrix,) = stored(1)
    merged = tsv_merge([delta, delta], rank=8)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert isinstance(merged, Images)
    assert relative(dense(merged), (left[:, :8] * values[:8]) @ right[:8]) < TOLERANCE
    none = Dense(torch.zeros(SHAPE), torch.zeros(SHAPE))
    assert not dense(tsv_merge([none, none])).any()
    with_none = tsv_merge([delta, none], rank=8)
    assert relative(dense(with_none), (left[:, :8] * values[:8]) @ right[:8]) < TOLERANCE


def test_rows_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, _ = stored(4)
    sizes: list[int] = []

    def recorded(*arguments: object) -> Iterator[list[Tensor]]:
        for blocks in row_blocks(*arguments):  # type: ignore[arg-type]
            sizes.extend(len(block) for block in blocks)
            yield blocks

    row_blocks = tall.row_blocks
    monkeypatch.setattr(tall, "row_blocks", recorded)
    monkeypatch.setattr(tsv, "svd", lambda *_: pytest.fail("a matrix was taken whole"))
    tsv_merge(deltas)
    assert sizes and max(sizes) == 100 and sum(sizes) == 2 * 4 * SHAPE[0]


def test_images_are_a_change_like_any_other() -> None:
    deltas, _ = stored(2)
    merged = tsv_merge(deltas)
    assert isinstance(merged, Images)
    whole = dense(merged)
    assert torch.equal(torch.cat(list(pieces(merged))).reshape(SHAPE), whole)
    assert torch.equal(merged.block(45, 1000), whole.reshape(-1)[45:1000])
    scaled = scale(merged, -0.5)
    assert isinstance(scaled, Images) and relative(dense(scaled), -0.5 * whole) < 1e-6
    assert relative(dense(total([merged, deltas[0]], [1.0, 2.0])), whole + 2 * dense(deltas[0])) < 1e-6
    assert relative(dense(merged.T), whole.T) < 1e-6
    assert torch.equal(dense(merged.to(torch.device("cpu"))), whole)
